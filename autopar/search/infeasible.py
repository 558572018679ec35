"""Infeasible: how much memory the least demanding plan needs, why, and what would help. All figures are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.errors import AutoparError, InfeasibleError, InputError, Remedy
from autopar.ir.solution import Limits, Pins
from autopar.search.cuts import CutRules
from autopar.search.leanest import EXACT_ENTRIES, Lean, leanest
from autopar.search.problem import make_problem
from autopar.search.shared import Space
from autopar.search.space import MODES, Skeleton, mesh_sizes
from autopar.units import format_bytes

MOST_PROMISING = 20
"""Skeletons looked at for the least demanding plan when tables are large."""
GROWTH = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class _Found:
    skeleton: Skeleton
    lean: Lean

    @property
    def peak(self) -> float:
        return self.lean.figures.peak_memory_bytes


def no_plan_error(space: Space, pins: Pins, limits: Limits) -> AutoparError:
    """The error for a space without any plan that fits and keeps the limits."""
    return memory_error(space, pins)


def memory_error(space: Space, pins: Pins) -> AutoparError:
    """The error for a space in which nothing fits."""
    found = _least(space, *_promising(space))
    if found is not None and not found.lean.proven:
        closer = _least(space, [found.skeleton], True)
        found = closer if closer is not None and closer.peak < found.peak else found
    if found is None:
        return InputError(
            f"no combination of strategies is admissible on the meshes allowed: the batch of "
            f"{space.source.graph.batch_size} samples or the model's sizes do not divide as the settings ask"
        )
    have = f"{format_bytes(space.device.memory_bytes)} usable per device"
    return InfeasibleError("memory", _need(found), have, tuple(_remedies(space, pins, found)))


def _promising(space: Space) -> tuple[list[Skeleton], bool]:
    """Skeletons most likely to need least: many devices, recompute, many microbatches; and whether that is all."""
    order = {"full": 0, "mixed": 1, "none": 2}
    ranked = sorted(space.skeletons, key=lambda s: (-s.num_gpus, order[s.mode], -s.num_microbatches, s))
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
        rules = CutRules(skeleton.num_stages, space.schedule, MODES[skeleton.mode], math.inf)
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


def _remedies(space: Space, pins: Pins, found: _Found) -> list[Remedy]:
    remedies = []
    if pins.recompute == "none":
        remedies += _if_fits(space, found.skeleton, "full", "allow recompute (drop the pin recompute=none)")
    remedies += _more_devices(space, pins, found)
    effect = f"the least demanding plan ({found.skeleton.describe()}) fits"
    remedies.append(Remedy(f"devices with {format_bytes(found.peak)} of usable memory", effect))
    return remedies


def _if_fits(space: Space, skeleton: Skeleton, mode: str, change: str) -> list[Remedy]:
    changed = Skeleton(skeleton.num_stages, skeleton.sizes, skeleton.num_microbatches, mode)
    found = _least(space, [changed], False)
    if found is None or found.peak > space.device.memory_bytes:
        return []
    return [Remedy(change, f"{format_bytes(found.peak)} with {changed.describe()}")]


def _more_devices(space: Space, pins: Pins, found: _Found) -> list[Remedy]:
    """The first multiple of the present number of devices that fits, by growing the stage mesh."""
    skeleton = found.skeleton
    if pins.dp is not None and pins.tp is not None:
        return []
    now = space.device.num_gpus
    for growth in GROWTH:
        if found.peak / growth > space.device.memory_bytes:
            continue
        num_devices = max(1, now * growth // skeleton.num_stages)
        for sizes in sorted(mesh_sizes(num_devices, pins), key=lambda s: (len(s), max(s)))[:3]:
            table = space.source.table(Skeleton(1, sizes, 1, "none").mesh, skeleton.num_microbatches)
            problem = make_problem(table) if table is not None else None
            if problem is None:
                continue
            rules = CutRules(skeleton.num_stages, space.schedule, MODES[skeleton.mode], math.inf)
            lean = leanest(problem, space.device, rules, exact=False)
            if lean is not None and lean.figures.fits(space.device.memory_bytes):
                peak = format_bytes(lean.figures.peak_memory_bytes)
                mesh = Skeleton(skeleton.num_stages, sizes, skeleton.num_microbatches, skeleton.mode).describe()
                return [Remedy(f"{now * growth} GPUs instead of {now}", f"{peak} with {mesh}")]
    return []
