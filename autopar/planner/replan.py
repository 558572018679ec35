"""Replan: another plan for a model that has one, after a deadline, a price, a power cap or the cluster has changed.

The best stored plan that keeps the new limits is picked, by the new objective, the old plan included; only where none
fits, or the user asks for it, is searched anew, and then the better of the new plan and the best stored one is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autopar.errors import InfeasibleError, InputError, PlanMismatchError, Remedy
from autopar.ir.pin_fields import pin_fields, pin_words
from autopar.ir.plan import Plan, SolverReport
from autopar.ir.serialize import parse_plan
from autopar.ir.solution import Limits, Objective, Pins
from autopar.ir.verify import LIMIT_SLACK
from autopar.planner.objective import JOULES_PER_KWH, SECONDS_PER_HOUR
from autopar.planner.plan import FEWER, cluster_reference
from autopar.planner.recall import Command, finished_plan
from autopar.planner.request import CLOCKS, PlanRequest, Progress, Target, choose_target
from autopar.planner.rival import check_unchanged, made_under, request_of
from autopar.planner.store import INDEX_NAME, Entry, Stored, entry_of, kept_in, recalled, remember, store_key
from autopar.search.infeasible import WORDS

EQUAL = 1e-9
"""Relative difference in the objective below which two plans cost the same."""
FIGURES = {
    "deadline_s": "step_time_s",
    "energy_j": "energy_j",
    "average_power_w": "average_power_w",
    "peak_power_w": "peak_power_w",
}
"""Limit -> the figure of an `Entry` that it bounds."""
OTHER_NUMBERS = "the device file, the profile or the power limit was another when it was made"
KINDS = ("time", "energy", "edp", "cost", "carbon")


@dataclass(frozen=True)
class Change:
    """What is no longer as it was when the plan was made; None: as it was.

    Attributes:
        energy_price, gpu_hour_price: the objective becomes cost at these, per kWh and per GPU and hour.
        grid_carbon_g: the objective becomes carbon at so many gCO2e per kWh.
        kind: the objective to ask for, one of KINDS.
    """

    limits: Limits = field(default_factory=Limits)
    num_gpus: int | None = None
    energy_price: float | None = None
    gpu_hour_price: float | None = None
    grid_carbon_g: float | None = None
    pue: float | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Means:
    """How another plan may be found.

    Attributes:
        store: directory of a frontier; None: that of the plan file, if it holds one. The cache is looked at, too.
        compute: search always (True), never (False), or where no stored plan fits (None).
        pins: of the search, whose answer alone counts; None: those that the plan was made under, which stored plans
            must have, too; `Pins()` drops them.
        clocks, profile: as for planning; None: as the plan was made.
    """

    store: Path | None = None
    compute: bool | None = None
    pins: Pins | None = None
    clocks: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class Replanned:
    """The answer.

    Attributes:
        plan: under the objective and limits that were asked for.
        how: `kept` (the old plan is still best), `picked` (from a store) or `computed`.
        num_stored, num_fitting: stored plans, and those that keep the limits.
        sources: where they come from.
        remarks: what the reader should know.
    """

    plan: Plan
    how: str
    num_stored: int
    num_fitting: int
    sources: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """The question, and the numbers of the cluster that it is about; `as_made`: they shaped the old plan, too."""

    request: PlanRequest
    target: Target
    as_made: bool
    remarks: tuple[str, ...]

    def value(self, entry: Entry) -> float:
        return self.request.objective.value(entry.step_time_s, entry.energy_j, entry.num_gpus)

    def excess(self, entry: Entry) -> list[str]:
        """Limits that the entry breaks, `num_gpus` and `clocks` among them."""
        limits = {name: getattr(self.request.limits, name) for name in FIGURES}
        broken = [n for n, most in limits.items() if most is not None and _figure(entry, n) > most * (1 + LIMIT_SLACK)]
        broken += ["num_gpus"] if entry.num_gpus > self.request.num_gpus else []
        return broken + (["clocks"] if entry.has_clocks and self.request.clocks == "max" else [])

    def best(self, found: Sequence[Stored]) -> Stored | None:
        """The least objective; of equals the fewest GPUs, then the fastest."""
        fitting = [stored for stored in found if not self.excess(stored.entry)]
        if not fitting:
            return None
        least = min(self.value(stored.entry) for stored in fitting)
        equal = [stored for stored in fitting if self.value(stored.entry) <= least + EQUAL * abs(least)]
        return min(equal, key=lambda s: (s.entry.num_gpus, s.entry.step_time_s, s.entry.file))


def replan(
    plan: Plan, path: str | Path, change: Change, means: Means | None = None, progress: Progress | None = None
) -> Replanned:
    """Pick or compute the plan that suits the change; `path` is the plan's file.

    Raises:
        InputError: the change makes no sense, or a store that was named is damaged or of something else.
        PlanMismatchError: a search was needed, and the model has changed.
        InfeasibleError: no plan keeps the limits, or no stored one where no search is allowed.
    """
    means = means or Means()
    asked = _asked(plan, change, means)
    found, sources, asked = _stored(plan, Path(path), asked, means)
    best = asked.best(found)
    num_fitting = sum(not asked.excess(stored.entry) for stored in found)

    def answer(chosen: Plan, how: str, remarks: tuple[str, ...] = ()) -> Replanned:
        return Replanned(chosen, how, len(found), num_fitting, sources, (*asked.remarks, *remarks))

    if means.compute is False and best is None:
        raise _nothing_stored(asked, found)
    if best is not None and not means.compute:
        return answer(*_picked(plan, best.load(), asked), _not_covered(asked, found))
    computed = _computed(plan, asked, progress)
    if best is not None and asked.value(best.entry) < _value(computed, asked) * (1 - EQUAL):
        return answer(*_picked(plan, best.load(), asked), ("a stored plan is better than the search's",))
    return answer(computed, "kept" if computed.decisions == plan.decisions else "computed")


def _asked(plan: Plan, change: Change, means: Means) -> _Asked:
    if change == Change():
        raise InputError("nothing has changed: give --deadline, --price, --power-cap, --gpus or another change")
    if change.num_gpus is not None and plan.cluster.description is not None:
        raise InputError("the plan is for a cluster of several types of GPU: plan again with another --cluster")
    new = {name: limit for name in FIGURES if (limit := getattr(change.limits, name)) is not None}
    request = replace(
        request_of(plan, made_under(plan) if means.pins is None else means.pins),
        num_gpus=change.num_gpus or plan.cluster.num_gpus,
        objective=_objective(plan, change),
        limits=replace(plan.limits, **new),
        profile=means.profile,
    )
    clocks = next((c for c in CLOCKS if _is_as_made(plan, request, c)), None)
    remarks = () if clocks else (f"the plan's figures do not count: {OTHER_NUMBERS}",)
    request = replace(request, clocks=means.clocks or clocks or "auto")
    return _Asked(request, choose_target(request), clocks is not None, remarks)


def _is_as_made(plan: Plan, request: PlanRequest, clocks: str) -> bool:
    """The numbers that are here now are those that shaped the plan, made with these clocks."""
    as_made = replace(request, num_gpus=plan.cluster.num_gpus, clocks=clocks)
    return choose_target(as_made).input_hash == plan.cluster.input_hash


def _objective(plan: Plan, change: Change) -> Objective:
    """The objective asked for: by name, else by what has changed, else the plan's own."""
    own, kind = plan.objective, change.kind
    if kind is None and (change.energy_price is not None or change.gpu_hour_price is not None):
        kind = "cost"
    if kind is None and change.grid_carbon_g is not None:
        kind = "carbon"
    if kind is None and own.kind == "time" and change.limits != Limits():
        # A limit is there to be used: the fastest plan has no use for a deadline.
        kind = "time" if change.limits.deadline_s is None else "energy"
    kind = kind or own.kind
    if kind not in ("cost", "carbon"):
        return own if kind == own.kind else Objective(kind)
    pue = own.pue if change.pue is None else change.pue
    kwh = change.energy_price if kind == "cost" else change.grid_carbon_g
    hour = change.gpu_hour_price if kind == "cost" else None
    is_own = own.kind == kind
    if kwh is None:
        if not is_own:
            flag = "--price" if kind == "cost" else "--grid-carbon"
            raise InputError(f"the objective {kind} needs {flag}: the plan was made for {own.kind}")
        kwh = own.energy_weight * JOULES_PER_KWH / own.pue
    gpu_second = own.gpu_second_weight if is_own else 0.0
    return Objective(
        kind,
        energy_weight=pue * kwh / JOULES_PER_KWH,
        gpu_second_weight=gpu_second if hour is None else hour / SECONDS_PER_HOUR,
        pue=pue,
    )


def _stored(plan: Plan, path: Path, asked: _Asked, means: Means) -> tuple[list[Stored], tuple[str, ...], _Asked]:
    """Plans at hand, the old one included if its figures count; where they lie; the question with further remarks."""
    if means.pins not in (None, Pins()):
        return [], (), asked
    key, groups = store_key(plan, asked.target), dict[str, list[Stored]]()
    if asked.as_made:
        own = Stored(entry_of(path.name, plan, path.read_text(encoding="utf-8")), path.parent)
        groups[str(path)] = [own]
    if means.store is not None:
        groups[str(means.store)] = kept_in(means.store, key)
    elif (path.parent / INDEX_NAME).is_file():
        try:
            groups[str(path.parent / INDEX_NAME)] = kept_in(path.parent, key)
        except InputError as error:
            asked = replace(asked, remarks=(*asked.remarks, f"not looked at: {error}"))
    groups["the cache"] = recalled(key)
    sources = tuple(name for name, group in groups.items() if group)
    # A plan may lie in several places: one is enough.
    by_content = {stored.entry.sha256: stored for group in reversed(groups.values()) for stored in group}
    pinned = pin_fields(asked.request.pins)
    return [stored for stored in by_content.values() if pinned in (None, stored.entry.pinned)], sources, asked


def _picked(plan: Plan, stored: Plan, asked: _Asked) -> tuple[Plan, str]:
    """The stored plan as the answer to what is asked, and whether it is the old one."""
    how = "kept" if stored.decisions == plan.decisions else "picked"
    value = _value(stored, asked)
    notes = (note for note in stored.notes if FEWER not in note)
    answer = replace(
        stored,
        cluster=replace(cluster_reference(asked.request, asked.target), origin=plan.cluster.origin),
        model=plan.model,
        objective=asked.request.objective,
        limits=asked.request.limits,
        solver=SolverReport("feasible", value, 0.0, 1.0 if value else 0.0, 0.0, "stored plans"),
        baselines=(),
        alternatives=(),
        notes=(*notes, "taken from stored plans without a search, so no bound is known"),
    )
    return answer, how


def _computed(plan: Plan, asked: _Asked, progress: Progress | None) -> Plan:
    command = Command(plan.model.source, plan.model.options, asked.request)
    try:
        found = parse_plan(finished_plan(command, progress).plan_text)
    except (InfeasibleError, InputError) as error:
        if plan.pinned is None or asked.request.pins != made_under(plan) or isinstance(error, PlanMismatchError):
            raise
        words = pin_words(plan.pinned)
        if isinstance(error, InputError):
            raise InputError(f"{error}; the plan is pinned to {words}: --unpin searches without") from error
        free = Remedy("--unpin", f"searches without what the plan is pinned to ({words})")
        raise replace(error, remedies=(*error.remedies, free)) from error
    check_unchanged(plan, found.model.graph_hash)
    remember([found], asked.target)
    return found


def _value(plan: Plan, asked: _Asked) -> float:
    predicted = plan.predicted
    energy_j, num_gpus = predicted.energy_j.value, plan.decisions.num_gpus
    return asked.request.objective.value(predicted.step_time_s.value, energy_j, num_gpus)


def _figure(entry: Entry, limit: str) -> float:
    figure: float = getattr(entry, FIGURES[limit])
    return figure


def _not_covered(asked: _Asked, found: Sequence[Stored]) -> tuple[str, ...]:
    """A remark where no plan at hand was looked for on as many GPUs as there are now."""
    num_gpus = asked.request.num_gpus
    if any(stored.entry.ceiling == num_gpus for stored in found):
        return ()
    return (
        f"no stored plan was made for up to {num_gpus} GPUs: --compute, or a frontier or sweep there, may do better",
    )


def _nothing_stored(asked: _Asked, found: Sequence[Stored]) -> InfeasibleError:
    """What stored plans need at least, limit by limit, the others kept."""
    search = Remedy("leave out --no-compute", "searches for another plan")
    if not found:
        return InfeasibleError("the store", "a stored plan", "none of this model and cluster", (search,))
    limits = asked.request.limits
    have = [WORDS[name].at_least(most) for name in FIGURES if (most := getattr(limits, name)) is not None]
    have += [f"--gpus {asked.request.num_gpus}"]
    remedies = []
    for name in (*FIGURES, "num_gpus"):
        near = [s.entry for s in found if asked.excess(s.entry) == [name]]
        if not near:
            continue
        if name == "num_gpus":
            least = min(near, key=lambda e: (e.num_gpus, asked.value(e)))
            remedies.append(Remedy(f"--gpus {least.num_gpus}", least.description, name, least.num_gpus))
        else:
            nearest = min(near, key=lambda e: (_figure(e, name), asked.value(e)))
            need = _figure(nearest, name)
            remedies.append(Remedy(WORDS[name].at_least(need), nearest.description, name, need))
    need_words = " or ".join(r.change for r in remedies) or "more than one limit relaxed"
    return InfeasibleError("the store", need_words, ", ".join(have), (*remedies, search))
