"""The entry: contraction, an incumbent along a few topological orders, then the exact program or CP-SAT."""

from __future__ import annotations

import math
import time

from autopar.search.partition.contract import Contracted, contract
from autopar.search.partition.dynamic import Cut, Devices, partition_ideals, simple_bound_s
from autopar.search.partition.general import general_partition
from autopar.search.partition.ideals import list_ideals, prefixes, tabulate
from autopar.search.partition.problem import PartitionProblem, PartitionResult, evaluate

MAX_IDEALS = 400_000
SAMPLED_IDEALS = 40_000
"""Size of the family searched first where the ideals are too many."""
TOLERANCE = 1e-6
"""Relative gap at or below which an answer is called optimal."""
GENERAL_SHARE = 0.3
"""Share of the time limit kept for CP-SAT's bound when the exact program runs out of time."""


def partition_graph(
    problem: PartitionProblem, *, time_limit_s: float = 60.0, max_ideals: int = MAX_IDEALS
) -> PartitionResult:
    """The contiguous partition with the smallest largest load, with a proven bound.

    Deterministic unless the time limit strikes or the ideals are too many (CP-SAT's optima are then the same, the
    partitions that attain them need not be).

    Args:
        time_limit_s: wall time after which the best partition so far and its bound are returned.
        max_ideals: graphs with more down-sets go to CP-SAT.

    Raises:
        InputError: if the graph has a cycle.
    """
    began_s = time.monotonic()
    graph = contract(problem)
    devices = Devices(problem.num_accelerators, problem.num_cpus, problem.memory_bytes)
    bound_s = simple_bound_s(graph, devices)
    if not math.isfinite(bound_s):
        return PartitionResult("infeasible", (), math.inf, math.inf, "dynamic-program", None)
    ideals = list_ideals(graph, max_ideals)
    num_orders = 0 if ideals is not None else SAMPLED_IDEALS // (2 * len(graph.units))
    incumbent = partition_ideals(
        tabulate(graph, prefixes(graph, num_orders)), graph, devices, deadline_s=began_s + time_limit_s / 4
    )
    cuts, load_s = incumbent.cuts, incumbent.load_s
    if ideals is not None:
        dynamic_s = time_limit_s if len(ideals) <= max_ideals // 10 else (1 - GENERAL_SHARE) * time_limit_s
        exact = partition_ideals(
            tabulate(graph, ideals), graph, devices, incumbent_s=load_s, deadline_s=began_s + dynamic_s
        )
        bound_s = max(bound_s, exact.bound_s)
        if exact.cuts is not None:
            cuts, load_s = exact.cuts, exact.load_s
        if exact.is_complete:
            return _result(problem, graph, cuts, bound_s=bound_s, method="dynamic-program", num_ideals=len(ideals))
    left_s = began_s + time_limit_s - time.monotonic()
    if left_s > 0:
        one_device_s = math.fsum((u.accelerator_s or 0.0) + u.cpu_s for u in graph.units)
        ceiling_s = min(load_s, one_device_s + math.fsum(cost_s for _, cost_s in graph.nets))
        general = general_partition(graph, devices, cuts, ceiling_s=ceiling_s, time_limit_s=left_s)
        bound_s = max(bound_s, general.bound_s)
        cuts = general.cuts if general.load_s < load_s else cuts
    num_ideals = None if ideals is None else len(ideals)
    return _result(problem, graph, cuts, bound_s=bound_s, method="cp-sat", num_ideals=num_ideals)


def _result(
    problem: PartitionProblem,
    graph: Contracted,
    cuts: tuple[Cut, ...] | None,
    *,
    bound_s: float,
    method: str,
    num_ideals: int | None,
) -> PartitionResult:
    if cuts is None:
        status = "infeasible" if math.isinf(bound_s) else "no-solution"
        return PartitionResult(status, (), math.inf, bound_s, method, num_ideals)
    parts = []
    for is_cpu, mask in cuts:
        units = (unit for index, unit in enumerate(graph.units) if mask >> index & 1)
        parts.append((is_cpu, frozenset(v for unit in units for v in unit.nodes)))
    shares = evaluate(problem, parts)
    load_s = max((share.load_s for share in shares), default=0.0)
    is_optimal = load_s - bound_s <= TOLERANCE * load_s
    return PartitionResult(
        "optimal" if is_optimal else "feasible", shares, load_s, min(bound_s, load_s), method, num_ideals
    )
