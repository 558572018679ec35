"""Prediction: the figures of one plan, from the same cost table that the search minimised over.

Stage times are sums over the table. The step time is that of the simulated schedule (`ir.timeline`), with each
transfer at the speed of the link it really crosses, and at least the plan's `pace_s`. Energy is the sum of dynamic
energy over all devices plus blocked power of every device used, and host power of every node used, for the whole step,
waiting included. Unused devices cost nothing. Peak power is that fixed power plus the hungriest op or redistribution
of any stage, on all devices used at once. Uncertainties are those of the device file; they are half widths of the
whole model, not of single inputs. On a mixed cluster every stage has the prices of its type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from autopar.cost.collective import LinearCost, send_cost
from autopar.cost.footprint import memory_by_cause, offloaded_bytes
from autopar.cost.live import most_live
from autopar.cost.memory import slack_share
from autopar.cost.mixed import MixedTables
from autopar.cost.passes import costs_at
from autopar.cost.power import dynamic_limit_w
from autopar.cost.stages import StageCost
from autopar.cost.table import CostTables
from autopar.cost.uneven import uneven_stage_cost
from autopar.errors import PlanMismatchError
from autopar.ir.pipeline import FORWARD_ONLY
from autopar.ir.plan import Prediction, StageFigures
from autopar.ir.quantity import modelled
from autopar.ir.solution import Decisions
from autopar.ir.timeline import Timeline, simulate


def stage_tables(tables: CostTables | MixedTables, decisions: Decisions) -> tuple[CostTables, ...]:
    """The tables that price each stage.

    Raises:
        PlanMismatchError: a stage lies on a type of GPU that the cluster does not have.
    """
    found = []
    for stage in decisions.stages:
        is_mixed = isinstance(tables, MixedTables)
        own = tables.part(stage.gpu) if isinstance(tables, MixedTables) else tables
        if own is None or (stage.gpu and not is_mixed and stage.gpu != own.cluster.gpu):
            raise PlanMismatchError(f"the plan has a stage on {stage.gpu or 'no named GPU'}, which the cluster has not")
        found.append(own)
    return tuple(found)


def _at_clocks(tables: CostTables, decisions: Decisions) -> tuple[StageCost, ...]:
    """Sums of every stage at the clock of its devices."""
    clocks = [_clock_index(tables, stage.clock_hz) for stage in decisions.stages]
    by_clock = {clock: costs_at(tables, decisions, clock) for clock in sorted(set(clocks))}
    return tuple(by_clock[clock][k] for k, clock in enumerate(clocks))


def _clock_index(tables: CostTables, clock_hz: float) -> int:
    """Index into the clocks of the cluster; 0 for devices left alone.

    Raises:
        PlanMismatchError: the cluster's devices have no such clock.
    """
    known = tables.clocks_hz
    if not clock_hz:
        return 0
    if clock_hz not in known:
        raise PlanMismatchError(f"the plan locks clocks at {clock_hz / 1e6:.0f} MHz, which these devices have not")
    return known.index(clock_hz)


def transfers_s(
    tables: CostTables | MixedTables, costs: Sequence[StageCost], decisions: Decisions
) -> tuple[float, ...]:
    """Seconds to send from each stage (or chunk) to the next, by where their devices stand."""
    each, n = stage_tables(tables, decisions), decisions.mesh.num_devices
    ranks = decisions.num_ranks
    found = []
    for k, cost in enumerate(costs[1:], start=1):
        if cost.wire is not None:
            found.append(send_cost(each[k].cluster, cost.wire.is_near).time_s(cost.wire.busiest_bytes))
            continue
        if each[k - 1] is not each[k]:
            found.append(_between_types(tables, decisions, k).time_s(cost.received_bytes))
            continue
        cluster, local = each[k].cluster, sum(own is each[k] for own in each[: k % ranks])
        before = local - 1 if k % ranks else ranks - 1
        pairs = ((before * n + i, local * n + i) for i in range(n))
        same_node = all(a // cluster.gpus_per_node == b // cluster.gpus_per_node for a, b in pairs)
        found.append(send_cost(cluster, same_node).time_s(cost.received_bytes))
    return tuple(found)


def _between_types(tables: CostTables | MixedTables, decisions: Decisions, stage: int) -> LinearCost:
    """The link from the stage before to `stage`, which lies on another type."""
    if not isinstance(tables, MixedTables):
        raise AssertionError("stages differ in type on a mixed cluster alone")
    return tables.send(decisions.stages[stage - 1].gpu, decisions.stages[stage].gpu)


def timeline_of(tables: CostTables | MixedTables, costs: Sequence[StageCost], decisions: Decisions) -> Timeline:
    """The simulated schedule."""
    return simulate(
        [cost.times for cost in costs],
        transfers_s(tables, costs, decisions),
        decisions.num_microbatches,
        decisions.schedule,
        interleave=decisions.interleave,
    )


def plan_costs(tables: CostTables | MixedTables, decisions: Decisions) -> tuple[tuple[StageCost, ...], dict[str, int]]:
    """Sums of every stage, and how many entries have each label.

    Raises:
        PlanMismatchError: as `predict`.
    """
    each, labels = stage_tables(tables, decisions), Counter[str]()
    if decisions.stage_meshes:
        return _uneven_costs(tables, decisions)
    by_type: dict[int, tuple[StageCost, ...]] = {}
    for own in each:
        if id(own) not in by_type:
            table = own.table(decisions.mesh, decisions.num_microbatches)
            if table is None:
                raise PlanMismatchError(f"the batch does not divide into {decisions.num_microbatches} microbatches")
            by_type[id(own)] = _at_clocks(own, decisions)
            labels.update(table.labels)
    costs = tuple(by_type[id(own)][k] for k, own in enumerate(each))
    if decisions.schedule == FORWARD_ONLY:
        _hold_live(each[0], costs, decisions)
    return costs, dict(labels)


def _hold_live(tables: CostTables, costs: Sequence[StageCost], decisions: Decisions) -> None:
    """Workspaces of inference: what is alive at once, since nothing of it is kept for backward."""
    values = tables.microbatch_values(decisions.num_microbatches)
    slack = 1.0 + slack_share(tables.software, tables.cluster.spec.unseen_share)
    for cost, live in zip(costs, most_live(tables.graph, values, decisions), strict=True):
        cost.workspace_bytes = max(cost.workspace_bytes, slack * live)
        cost.op_workspace_bytes = max(cost.op_workspace_bytes, slack * live)


def _uneven_costs(
    tables: CostTables | MixedTables, decisions: Decisions
) -> tuple[tuple[StageCost, ...], dict[str, int]]:
    """As `plan_costs`, each stage by the table of its own mesh."""
    if isinstance(tables, MixedTables):
        raise PlanMismatchError("stages with meshes of their own lie on one type of GPU, not on a mixed cluster")
    costs, labels = [], Counter[str]()
    for k, (mesh, stage) in enumerate(zip(decisions.stage_meshes, decisions.stages, strict=True)):
        table, clock = tables.table(mesh, decisions.num_microbatches), _clock_index(tables, stage.clock_hz)
        if table is None:
            raise PlanMismatchError(f"the batch does not divide into {decisions.num_microbatches} microbatches")
        figures = tables.clock_figures(mesh, decisions.num_microbatches) if clock else None
        own = table if figures is None else figures.at(table, clock)
        costs.append(uneven_stage_cost(tables, own, decisions, k))
        if mesh not in decisions.stage_meshes[:k]:
            labels.update(table.labels)
    return tuple(costs), dict(labels)


def predict(tables: CostTables | MixedTables, decisions: Decisions) -> Prediction:
    """All figures of a plan.

    Raises:
        PlanMismatchError: if the decisions do not fit the graph, mesh and cluster of `tables`.
    """
    if any(own.pins.offload != decisions.offload for own in stage_tables(tables, decisions)):
        raise PlanMismatchError(f"the plan offloads {decisions.offload.words or 'nothing'}, the prices are for another")
    costs, labels = plan_costs(tables, decisions)
    time_s = max(timeline_of(tables, costs, decisions).makespan_s, decisions.pace_s)
    sends_j = sum(_sends_j(tables, decisions, k, cost) for k, cost in enumerate(costs))
    each = stage_tables(tables, decisions)
    return _prediction(each, decisions, costs, time_s=time_s, sends_j=sends_j, labels=labels)


def _prediction(
    each: Sequence[CostTables], decisions: Decisions, costs: tuple[StageCost, ...],
    *, time_s: float, sends_j: float, labels: Mapping[str, int],
) -> Prediction:  # fmt: skip
    """`sends_j` are joules of one microbatch over all cuts."""
    widths, count = [mesh.num_devices for mesh in decisions.meshes], decisions.num_microbatches
    used = {id(own): own.cluster for own in each}
    devices_on = Counter[int]()
    for own, width in zip(each, widths, strict=False):
        devices_on[id(own)] += width
    clusters = [(cluster, devices_on[key]) for key, cluster in used.items()]
    blocked_w = sum(cluster.spec.blocked_w * devices for cluster, devices in clusters)
    host_w = sum(cluster.spec.host_w_per_node * cluster.nodes(devices) for cluster, devices in clusters)
    energy = {
        "dynamic": sum(widths[k % len(widths)] * (count * c.microbatch_j + c.step_j) for k, c in enumerate(costs))
        + count * sends_j,
        "blocked": blocked_w * time_s,
        "host": host_w * time_s,
    }
    energy_j = sum(energy.values())
    highest_w = 0.0
    for key, cluster in used.items():
        hungriest = max(c.peak_w for c, own in zip(costs, each, strict=True) if id(own) == key)
        highest_w += devices_on[key] * min(hungriest, dynamic_limit_w(cluster.spec))
    peak_w = max(highest_w + blocked_w + host_w, energy_j / time_s)
    ranks = range(decisions.num_ranks)
    memory = [memory_by_cause(costs, k, decisions, each[k].software, each[k].cluster.spec.unseen_share) for k in ranks]
    elsewhere = [offloaded_bytes(costs, rank, decisions) for rank in ranks]
    peaks = tuple(modelled(sum(memory[k].values()), "B", each[k].cluster.spec.memory_uncertainty) for k in ranks)
    wide = max(cluster.spec.time_uncertainty for cluster, _ in clusters)
    energy_wide = max(cluster.spec.energy_uncertainty for cluster, _ in clusters)
    return Prediction(
        step_time_s=modelled(time_s, "s", wide),
        energy_j=modelled(energy_j, "J", energy_wide),
        average_power_w=modelled(energy_j / time_s, "W", energy_wide),
        peak_power_w=modelled(peak_w, "W", energy_wide),
        peak_memory_bytes=peaks,
        stages=tuple(
            StageFigures(
                modelled(c.forward_s, "s", wide), modelled(c.backward_s, "s", wide), modelled(c.step_s, "s", wide),
                peaks[k % len(ranks)], memory[k % len(ranks)], elsewhere[k % len(ranks)],
            )
            for k, c in enumerate(costs)
        ),
        energy_by_cause=energy,
        tdp_energy_j=sum(cluster.spec.limit_w * devices for cluster, devices in clusters) * time_s,
        sources=labels,
    )  # fmt: skip


def _sends_j(tables: CostTables | MixedTables, decisions: Decisions, stage: int, cost: StageCost) -> float:
    """Joules of one microbatch over the cut before a stage, both ways if anything comes back."""
    if cost.wire is not None:
        cluster = stage_tables(tables, decisions)[stage].cluster
        return cost.wire.total_bytes * send_cost(cluster, cost.wire.is_near).j_per_byte
    ways = 1 if decisions.schedule == FORWARD_ONLY else 2
    return ways * decisions.mesh.num_devices * cost.received_bytes * _send_j_per_byte(tables, decisions, stage)


def _send_j_per_byte(tables: CostTables | MixedTables, decisions: Decisions, stage: int) -> float:
    """From the stage before (of stage 0, which receives nothing: its own)."""
    each = stage_tables(tables, decisions)
    if stage and each[stage - 1] is not each[stage]:
        return _between_types(tables, decisions, stage).j_per_byte
    cluster = each[stage].cluster
    return send_cost(cluster, same_node=2 * decisions.mesh.num_devices <= cluster.gpus_per_node).j_per_byte
