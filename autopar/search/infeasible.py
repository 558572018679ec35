"""Infeasible: which limit binds, what the least demanding plan needs, and what would help.

All figures are computed by searches (`relaxations`); suggested values are rounded up, so that a plan keeps them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from autopar.errors import AutoparError, InfeasibleError, InputError, Remedy
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.cuts import CutRules
from autopar.search.leanest import EXACT_ENTRIES, Lean, leanest
from autopar.search.relaxations import LIMIT_NAMES, MOST_GROWTH, Explorer, Reached, Relaxation, Room
from autopar.search.shared import Space
from autopar.search.space import MODES, Skeleton, Skeletons
from autopar.search.stages import Question
from autopar.units import GIB, KIB, MIB, format_bytes, format_joules, format_seconds, format_watts

MOST_PROMISING = 20
"""Skeletons looked at for the least demanding plan when tables are large."""
PROVEN = 1e-3
"""Relative distance to what is proven to be too little at which a value counts as the least."""
REMEDIES_S = 120.0
"""Wall-clock limit on the search for ways out where the user gave none."""


@dataclass(frozen=True)
class _Words:
    """How a limit is spoken of: its name, its flag, the figure it bounds, and units by size, largest first."""

    name: str
    flag: str
    figure: str
    units: tuple[tuple[str, float], ...]

    def show(self, value: float) -> str:
        """Four digits, rounded to nearest."""
        shown = {"deadline_s": format_seconds, "energy_j": format_joules, "memory_bytes": format_bytes}
        return shown.get(self.name, format_watts)(value)

    def at_least(self, value: float) -> str:
        """The flag with four digits, rounded up."""
        unit, size = next((u for u in self.units if value >= u[1]), self.units[-1])
        return f"{self.flag} {_round_up(value / size):.10g}{unit}"


WORDS = {
    "deadline_s": _Words("deadline_s", "--deadline", "deadline", (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))),
    "energy_j": _Words(
        "energy_j", "--energy-budget", "energy budget", (("MJ", 1e6), ("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3))
    ),
    "average_power_w": _Words("average_power_w", "--power-cap", "average power cap", (("kW", 1e3), ("W", 1.0))),
    "peak_power_w": _Words("peak_power_w", "--peak-power", "peak power limit", (("kW", 1e3), ("W", 1.0))),
    "memory_bytes": _Words(
        "memory_bytes", "--memory", "memory", (("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1.0))
    ),
}


@dataclass(frozen=True)
class _Found:
    skeleton: Skeleton
    lean: Lean

    @property
    def peak(self) -> float:
        return self.lean.figures.peak_memory_bytes


def no_plan_error(
    space: Space,
    pins: Pins,
    limits: Limits,
    skeletons: Skeletons,
    *,
    use_all: bool = False,
    max_microbatches: int | None = None,
) -> AutoparError:
    """The error for a space without any plan that fits and keeps the limits; `skeletons` are those without limits."""
    stop_s = time.monotonic() + REMEDIES_S if space.deadline_s is None else space.deadline_s
    if space.mixed is not None:
        space.deadline_s = stop_s
        return _mixed_error(space, limits)
    explorer = Explorer(space, pins, skeletons, use_all, max_microbatches, stop_s)
    room = Room(space.device.memory_bytes, space.device.num_gpus, limits)
    free = Room(room.memory_bytes, room.num_gpus, Limits())
    if limits.is_free or explorer.ask(free) is None:
        return memory_error(replace(space, skeletons=skeletons), pins, explorer, free)
    return _limits_error(explorer, room)


def _mixed_error(space: Space, limits: Limits) -> AutoparError:
    """On several types of GPU: the least memory, or the least time and energy that plans without limits reach."""
    fastest = Question(space, Objective("time")).run()
    if fastest.plan is None:
        found = _least(space, *_promising(space))
        if found is None:
            return _nothing_admissible(space)
        sizes = ", ".join(format_bytes(part.device.memory_bytes) for part in space.mixed.parts) if space.mixed else ""
        return InfeasibleError("memory", _need(found), f"{sizes} usable per device", (_roomier(found),))
    names = [name for name in LIMIT_NAMES if getattr(limits, name) is not None]
    needs, remedies = [], []
    for name, kind in (("deadline_s", "time"), ("energy_j", "energy")):
        reached = Question(space, Objective(kind)).run() if name in names else fastest
        if name in names and reached.plan is not None:
            words = WORDS[name]
            needs.append(f"{words.figure} of at least {words.show(reached.value)} if nothing else were limited")
            effect = f"{reached.plan.skeleton.describe(space.mixed.names if space.mixed else ())}, other limits free"
            remedies.append(Remedy(words.at_least(reached.value), effect, name, reached.value))
    have = ", ".join(f"{WORDS[name].figure} {WORDS[name].show(getattr(limits, name))}" for name in names)
    limit = " and ".join(WORDS[name].figure for name in names)
    return InfeasibleError(limit, "; ".join(needs) or "more than the limit allows", have, tuple(remedies))


def _limits_error(explorer: Explorer, room: Room) -> InfeasibleError:
    """Plans fit, but none keeps the limits."""
    names = [name for name in LIMIT_NAMES if getattr(room.limits, name) is not None]
    nearest = [found for name in names if (found := explorer.relax(room, name)) is not None]
    further = [found for name in ("memory_bytes", "num_gpus") if (found := explorer.relax(room, name)) is not None]
    remedies = [_remedy(found, room.num_gpus) for found in nearest + further]
    if explorer.ran_out:
        remedies.append(Remedy("more time (--time-limit)", "the search for ways out was stopped early"))
    if nearest:
        needs = [f"{_needed(found)}" for found in nearest]
        binding = [found.name for found in nearest]
    else:
        binding = names
        alone = [explorer.relax(_alone(room, name), name) for name in names]
        needs = [f"{_needed(found)} if nothing else were limited" for found in alone if found is not None]
    have = ", ".join(f"{WORDS[name].figure} {WORDS[name].show(getattr(room.limits, name))}" for name in names)
    limit = " and ".join(WORDS[name].figure for name in binding)
    return InfeasibleError(limit, "; or ".join(needs), have, tuple(remedies))


def _alone(room: Room, name: str) -> Room:
    """The room with no limit but one."""
    return Room(room.memory_bytes, room.num_gpus, Limits(**{name: getattr(room.limits, name)}))


def _needed(found: Relaxation) -> str:
    words = WORDS[found.name]
    article = "an" if words.figure[0] in "ae" else "a"
    return f"{article} {words.figure} of {words.show(found.value)}"


def _remedy(found: Relaxation, num_gpus: int) -> Remedy:
    if found.name == "num_gpus":
        change = f"{found.value:.0f} GPUs instead of {num_gpus} (--gpus {found.value:.0f})"
        return Remedy(change, _effect(found.reached), found.name, found.value)
    words = WORDS[found.name]
    proven = "" if found.value > found.proven * (1 + PROVEN) else "; the least, proven"
    return Remedy(words.at_least(found.value), f"{_effect(found.reached)}{proven}", found.name, found.value)


def _effect(reached: Reached) -> str:
    figures = f"{format_seconds(reached.time_s)}, {format_joules(reached.energy_j)}"
    memory = format_bytes(reached.plan.figures.peak_memory_bytes)
    return f"{figures} and {memory} with {reached.plan.skeleton.describe()}"


def _round_up(value: float) -> float:
    """To four significant digits."""
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return math.ceil(value * scale * (1 - 1e-12)) / scale


def memory_error(space: Space, pins: Pins, explorer: Explorer, room: Room) -> AutoparError:
    """The error for a space in which nothing fits."""
    found = _least(space, *_promising(space))
    if found is not None and not found.lean.proven:
        closer = _least(space, [found.skeleton], True)
        found = closer if closer is not None and closer.peak < found.peak else found
    if found is None:
        return _nothing_admissible(space)
    have = f"{format_bytes(space.device.memory_bytes)} usable per device"
    return InfeasibleError("memory", _need(found), have, tuple(_remedies(explorer, pins, room, found)))


def _nothing_admissible(space: Space) -> InputError:
    return InputError(
        f"no combination of strategies is admissible on the meshes allowed: the batch of "
        f"{space.source.graph.batch_size} samples or the model's sizes do not divide as the settings ask"
    )


def least_peak(space: Space) -> float:
    """Bytes per device of the least demanding plan found; inf if none is admissible."""
    found = _least(space, *_promising(space))
    return math.inf if found is None else found.peak


def _promising(space: Space) -> tuple[list[Skeleton], bool]:
    """Skeletons most likely to need least: many devices, recompute, many microbatches; and whether that is all."""
    order = {"full": 0, "mixed": 1, "none": 2}
    every = dict.fromkeys(replace(s, kinds=()) for s in space.skeletons)  # memory does not depend on the type
    ranked = sorted(every, key=lambda s: (-s.num_gpus, order[s.mode], -s.num_microbatches, s))
    if space.ideal is None:
        problems = [space.uncapped(s.sizes, s.num_microbatches) for s in ranked]
        if all(problem is None or problem.num_entries <= EXACT_ENTRIES for problem in problems):
            return ranked, True
    return ranked[:MOST_PROMISING], False


def _least(space: Space, skeletons: list[Skeleton], exact: bool) -> _Found | None:
    best: _Found | None = None
    for skeleton in skeletons:
        problem = space.uncapped(skeleton.sizes, skeleton.num_microbatches)
        if problem is None:
            continue
        memory = (math.inf,) * skeleton.num_stages
        rules = CutRules(skeleton.num_stages, space.schedule, MODES[skeleton.mode], memory)
        lean = leanest(problem, space.device, rules, exact=exact)
        if lean is not None and (best is None or lean.figures.peak_memory_bytes < best.peak):
            best = _Found(skeleton, lean)
    return best


def _need(found: _Found) -> str:
    figures = found.lean.figures
    stage = max(range(len(figures.memory_bytes)), key=lambda k: figures.memory_bytes[k])
    causes = figures.memory_by_cause[stage]
    parts = ", ".join(f"{cause} {format_bytes(size)}" for cause, size in sorted(causes.items(), key=lambda c: -c[1]))
    proven = "" if found.lean.proven else ", the least found,"
    return f"{format_bytes(found.peak)}{proven} on stage {stage} ({parts}) with {found.skeleton.describe()}"


def _remedies(explorer: Explorer, pins: Pins, room: Room, found: _Found) -> list[Remedy]:
    remedies = []
    if pins.recompute == "none":
        remedies += _if_fits(explorer.space, found.skeleton, "full", "allow recompute (drop the pin recompute=none)")
    explorer.least_growth = found.peak / room.memory_bytes
    if explorer.least_growth <= MOST_GROWTH:
        # A device's share of anything falls at most as the number of devices grows.
        more = explorer.relax(room, "num_gpus")
        remedies += [] if more is None else [_remedy(more, room.num_gpus)]
    return [*remedies, _roomier(found)]


def _roomier(found: _Found) -> Remedy:
    effect = f"the least demanding plan ({found.skeleton.describe()}) fits"
    change = f"devices with {format_bytes(found.peak)} of usable memory"
    return Remedy(change, effect, "memory_bytes", found.peak)


def _if_fits(space: Space, skeleton: Skeleton, mode: str, change: str) -> list[Remedy]:
    changed = Skeleton(skeleton.num_stages, skeleton.sizes, skeleton.num_microbatches, mode)
    found = _least(space, [changed], False)
    if found is None or found.peak > space.device.memory_bytes:
        return []
    return [Remedy(change, f"{format_bytes(found.peak)} with {changed.describe()}")]
