"""search: the entry. From table source, objective and pins to a Solution with bound and gap.

Linear objectives are one weighted search. The energy-delay product E T is minimised by its supported points: weighted
searches give half-planes alpha T + beta E >= L that contain every plan; the least product over the polygon they
leave is a bound (a quasi-concave function is least at a vertex), and the next weights are the product's gradient at
that vertex, until bound and best plan met agree.
"""

from __future__ import annotations

import math
import time

from autopar.errors import InputError, SolverLimitError
from autopar.ir.cost import CostTable, TableSource
from autopar.ir.pipeline import SCHEDULES
from autopar.ir.solution import RECOMPUTE, Alternative, Decisions, Objective, Pins, Solution
from autopar.search.infeasible import memory_error
from autopar.search.space import Skeleton, list_skeletons
from autopar.search.stages import Plan, Progress, Space, WeightedSearch

SOLVER = "elimination + dynamic programme + HiGHS"
NUM_ALTERNATIVES = 8
NUM_UNMET = 3
MAX_EDP_ROUNDS = 24
LINEAR_SHARE, EDP_SHARE = 0.999, 0.333
"""Part of the gap that a weighted search may leave: all but rounding; the product of two planes doubles it."""


def search(
    tables: TableSource,
    objective: Objective,
    *,
    pins: Pins,
    use_all: bool = False,
    gap_tolerance: float = 1e-3,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    max_microbatches: int | None = None,
) -> Solution:
    """Find the best plan over the space of `space`.

    Args:
        tables: prices; also names the graph and the device limits.
        objective: what is minimised.
        pins: user restrictions; `schedule` None means 1f1b.
        use_all: use exactly `device.num_gpus` devices.
        gap_tolerance: relative gap at which the search stops.
        time_limit_s: wall-clock limit; the incumbent and its bound are returned when it strikes.
        progress: called with a dict after each refinement.
        max_microbatches: largest M tried.

    Raises:
        InputError: if the pins describe an empty space or an unknown name.
        InfeasibleError: if no plan fits into memory; proven.
        SolverLimitError: if the time limit struck before any plan was found.
    """
    started = time.monotonic()
    _check(pins, gap_tolerance)
    skeletons = list_skeletons(tables, pins, use_all=use_all, max_microbatches=max_microbatches)
    deadline = None if time_limit_s is None else started + time_limit_s
    is_product = objective.kind == "edp"
    inner = gap_tolerance * (EDP_SHARE if is_product else LINEAR_SHARE)
    space = Space(tables, objective, pins.schedule or "1f1b", inner, skeletons, deadline, progress)
    bound, bounds = _product(space, gap_tolerance) if is_product else _linear(space)
    if space.best is None:
        if space.out_of_time:
            raise SolverLimitError(f"no plan found within {time_limit_s} s; allow more time or pin more choices")
        raise memory_error(space, pins)
    best = space.best
    value = space.value(best)
    bound = min(bound, value)
    gap = (value - bound) / abs(value) if value else 0.0
    return Solution(
        decisions=decisions_of(space, best),
        time_s=best.figures.time_s,
        energy_j=best.figures.energy_j,
        objective=objective,
        objective_value=value,
        bound=bound,
        status="optimal" if gap <= gap_tolerance else "feasible",
        solver=SOLVER,
        wall_s=time.monotonic() - started,
        alternatives=_alternatives(space, best, bounds),
        gap_parts={"sharding and stages": gap} if gap > 0 else {},
    )


def _check(pins: Pins, gap_tolerance: float) -> None:
    if not 0 <= gap_tolerance < 1:
        raise InputError(f"gap tolerance {gap_tolerance} is not in [0, 1)")
    if pins.schedule is not None and pins.schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {pins.schedule!r}; known: {', '.join(SCHEDULES)}")
    if pins.recompute is not None and pins.recompute not in RECOMPUTE:
        raise InputError(f"unknown recompute {pins.recompute!r}; known: {', '.join(RECOMPUTE)}")
    for name in ("dp", "tp", "pp", "num_microbatches"):
        value = getattr(pins, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} is below 1")


def _linear(space: Space) -> tuple[float, dict[Skeleton, float]]:
    weights = {
        "time": (1.0, 0.0),
        "energy": (0.0, 1.0),
        "weighted": (space.objective.time_weight, space.objective.energy_weight),
    }
    run = WeightedSearch(space, *weights[space.objective.kind])
    result = run.run()
    return result.bound, run.bounds


def _product(space: Space, gap_tolerance: float) -> tuple[float, dict[Skeleton, float]]:
    """Dichotomy on weights; see the module docstring."""
    planes: list[tuple[float, float, float]] = []
    alpha, beta = 1.0, 0.0
    bound, bounds = -math.inf, {}
    for round_index in range(MAX_EDP_ROUNDS):
        run = WeightedSearch(space, alpha, beta)
        result = run.run()
        if space.best is None:
            return math.inf, run.bounds
        if round_index == 0:
            bounds = run.bounds
        planes.append((alpha, beta, max(result.bound, 0.0)))
        if round_index == 0:
            alpha, beta = 0.0, 1.0
            continue
        time_s, energy_j = _least_vertex(planes)
        bound = max(bound, time_s * energy_j)
        if bound >= space.value(space.best) * (1 - gap_tolerance) or not result.complete:
            break
        alpha, beta = (energy_j, time_s) if time_s > 0 and energy_j > 0 else (1.0, 1.0)
        scale = alpha + beta
        alpha, beta = alpha / scale, beta / scale
    return bound, bounds


def _least_vertex(planes: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Vertex of {alpha T + beta E >= L for all planes} with the least product T E."""
    best = (math.inf, math.inf)
    for i, (a1, b1, l1) in enumerate(planes):
        for a2, b2, l2 in planes[:i]:
            determinant = a1 * b2 - a2 * b1
            if abs(determinant) < 1e-15 * (abs(a1) + abs(b1)) * (abs(a2) + abs(b2)):
                continue
            time_s, energy_j = (l1 * b2 - l2 * b1) / determinant, (a1 * l2 - a2 * l1) / determinant
            inside = all(a * time_s + b * energy_j >= level - 1e-12 * abs(level) for a, b, level in planes)
            if inside and time_s * energy_j < best[0] * best[1]:
                best = (time_s, energy_j)
    return best


def decisions_of(space: Space, plan: Plan) -> Decisions:
    """Spell a plan out by op, value and parameter name."""
    problem = space.problem(plan.skeleton.sizes, plan.skeleton.num_microbatches)
    if problem is None:
        raise SolverLimitError("the table of the chosen mesh is gone")
    return spell_out(problem.table, plan, space.schedule)


def spell_out(table: CostTable, plan: Plan, schedule: str) -> Decisions:
    """Decisions of a choice of strategies: every concrete op, hub and parameter of tied nodes gets its own entry."""
    found: dict[str, dict[str, object]] = {"op": {}, "hub": {}, "param": {}}
    for node, p in zip(table.nodes, plan.choice, strict=True):
        for name in node.names:
            found[node.kind][name.removeprefix(f"{node.kind}:")] = node.choices[p]
    ordered = {kind: dict(sorted(entries.items())) for kind, entries in found.items()}
    return Decisions(
        mesh=table.mesh,
        num_microbatches=table.num_microbatches,
        schedule=schedule,
        stages=plan.layout.choices(),
        ops=ordered["op"],  # type: ignore[arg-type]
        hubs=ordered["hub"],  # type: ignore[arg-type]
        parameters=ordered["param"],  # type: ignore[arg-type]
    )


def _alternatives(space: Space, best: Plan, bounds: dict[Skeleton, float]) -> tuple[Alternative, ...]:
    """The best plan of each other (mesh, K), best first, then the skeletons that fell out by bound alone."""
    linear = space.objective.kind != "edp"
    found: dict[tuple[tuple[int, ...], int], Plan] = {}
    for plan in sorted(space.plans.values(), key=lambda p: (space.value(p), p.skeleton)):
        found.setdefault((plan.skeleton.sizes, plan.skeleton.num_stages), plan)
    chosen = (best.skeleton.sizes, best.skeleton.num_stages)
    value = space.value(best)
    listed = []
    for key, plan in found.items():
        if key == chosen:
            continue
        worse = space.value(plan) / value - 1 if value else 0.0
        listed.append(
            Alternative(
                plan.skeleton.describe(),
                plan.figures.time_s,
                plan.figures.energy_j,
                space.value(plan),
                bounds.get(plan.skeleton) if linear else None,
                f"{worse:.1%} worse than the plan chosen",
            )
        )
    unmet = _unmet(bounds, {key[1] for key in found}) if linear else []
    return tuple(listed[: NUM_ALTERNATIVES - len(unmet)] + unmet)


def _unmet(bounds: dict[Skeleton, float], seen: set[int]) -> list[Alternative]:
    """For numbers of stages without any plan met: the skeleton of least bound, and why nothing came of it."""
    least: dict[int, Skeleton] = {}
    for skeleton, bound in sorted(bounds.items(), key=lambda entry: (entry[1], entry[0])):
        if skeleton.num_stages not in seen and bound > -math.inf:
            least.setdefault(skeleton.num_stages, skeleton)
    listed = []
    for skeleton in list(least.values())[:NUM_UNMET]:
        bound = bounds[skeleton]
        fits = math.isfinite(bound)
        reason = "no plan of it can beat its bound" if fits else "no plan of it fits into memory"
        listed.append(Alternative(skeleton.describe(), None, None, None, bound if fits else None, reason))
    return listed
