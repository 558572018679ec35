"""Energy of any plan of small graphs: what must hold whatever the graph, the split and the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autopar.cost.device import Link
from autopar.cost.hardware import Cluster, load_cluster, with_power_limit
from autopar.cost.predict import plan_costs, predict
from autopar.cost.table import CostTables
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.plan import Prediction
from autopar.ir.solution import Decisions, Limits
from autopar.planner.choose import simulated
from tests.cost.decide import by_label, decide
from tests.cost.devices import plain_cluster
from tests.toy_graphs import attention_graph, mlp_graph, residual_graph

SOME = settings(max_examples=25, deadline=None, derandomize=True)
GRAPHS: tuple[OpGraph, ...] = (mlp_graph(), residual_graph(layers=2), residual_graph(layers=4), attention_graph(8))
SLACK = 1e-9


@dataclass(frozen=True)
class Drawn:
    """A plan without its prices."""

    graph: OpGraph
    devices: int
    microbatches: int
    labels: tuple[str, ...]
    cuts: tuple[int, ...]
    recompute: str

    def decided(self, cluster: Cluster, cuts: tuple[int, ...] | None = None) -> tuple[CostTables, Decisions]:
        """Prices on a cluster, and the decisions; `cuts` in place of its own."""
        tables = CostTables(self.graph, cluster)
        table = tables.table(stage_mesh(self.devices), self.microbatches)
        assert table is not None
        own = self.cuts if cuts is None else cuts
        return tables, decide(table, by_label(*self.labels), own, recompute=self.recompute)

    def predicted(self, cluster: Cluster, cuts: tuple[int, ...] | None = None) -> Prediction:
        return predict(*self.decided(cluster, cuts))


@st.composite
def drawn_plans(draw: st.DrawFn) -> Drawn:
    graph = draw(st.sampled_from(GRAPHS))
    count = len(graph.blocks)
    cuts = draw(st.sets(st.integers(1, count - 1), max_size=3)) if count > 1 else set()
    return Drawn(
        graph,
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([(), ("batch",)])),
        tuple(sorted(cuts)),
        draw(st.sampled_from(["none", "full"])),
    )


def clocked_cluster(**changes: object) -> Cluster:
    """16 GPUs that lower their clocks under a power limit; sends cost energy."""
    link = Link(1e10, 0.0, 0.0, 0.0, 1e-9)
    control = load_cluster("a100-pcie-80gb", 1).spec.clock_control
    known = {"clock_control": control, "gemm_share": 1.0, "intra_node": link, "inter_node": link}
    return plain_cluster(16, **(known | changes))


@SOME
@given(plan=drawn_plans())
def test_no_part_of_the_energy_is_negative_and_they_make_up_the_whole(plan: Drawn) -> None:
    figures = plan.predicted(clocked_cluster())
    assert all(part >= 0 for part in figures.energy_by_cause.values())
    energy_j, time_s = figures.energy_j.value, figures.step_time_s.value
    assert energy_j == pytest.approx(sum(figures.energy_by_cause.values()))
    assert 0 < energy_j == pytest.approx(figures.average_power_w.value * time_s)
    assert figures.average_power_w.value <= figures.peak_power_w.value * (1 + SLACK)


@SOME
@given(plan=drawn_plans())
def test_dynamic_energy_is_the_sum_over_stages_and_their_sends(plan: Drawn) -> None:
    """The whole model on one stage costs what its cuts cost, but for what is sent between them."""
    cluster = clocked_cluster()
    tables, decisions = plan.decided(cluster)
    costs, _ = plan_costs(tables, decisions)
    own_j = plan.devices * sum(plan.microbatches * cost.microbatch_j + cost.step_j for cost in costs)
    sent = 2 * plan.devices * plan.microbatches * sum(cost.received_bytes for cost in costs)
    dynamic_j = plan.predicted(cluster).energy_by_cause["dynamic"]
    assert dynamic_j == pytest.approx(own_j + sent * 1e-9)
    whole_j = plan.predicted(cluster, ()).energy_by_cause["dynamic"]
    assert own_j == pytest.approx(whole_j, rel=1e-6)
    assert bool(sent) == bool(plan.cuts)


@SOME
@given(plan=drawn_plans(), name=st.sampled_from(["blocked_w", "host_w_per_node", "idle_w"]), data=st.data())
def test_energy_never_falls_with_the_power_of_waiting(plan: Drawn, name: str, data: st.DataObject) -> None:
    """Blocked power counts in what kernels draw, too: less is then left of the limit for their dynamic part."""
    low, high = sorted(data.draw(st.floats(1.0, 140.0)) for _ in range(2))
    lower, higher = (plan.predicted(clocked_cluster(**{name: watts})) for watts in (low, high))
    assert lower.energy_j.value <= higher.energy_j.value * (1 + SLACK)


@SOME
@given(plan=drawn_plans(), data=st.data())
def test_a_lower_power_limit_of_the_gpus_never_lowers_time(plan: Drawn, data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.floats(51.0, 150.0)) for _ in range(2))
    tight, loose = (plan.predicted(with_power_limit(clocked_cluster(), watts)) for watts in (low, high))
    assert tight.step_time_s.value >= loose.step_time_s.value * (1 - SLACK)
    assert tight.peak_power_w.value <= loose.peak_power_w.value * (1 + SLACK)


@SOME
@given(plan=drawn_plans(), shares=st.tuples(st.floats(0.05, 1.1), st.floats(0.05, 1.1)))
def test_a_lower_cap_on_average_power_never_lowers_time(plan: Drawn, shares: tuple[float, float]) -> None:
    tables, decisions = plan.decided(clocked_cluster())
    free = predict(tables, decisions)
    waiting_w = (free.energy_by_cause["blocked"] + free.energy_by_cause["host"]) / free.step_time_s.value
    spread_w = free.average_power_w.value - waiting_w
    assume(spread_w > 0)
    caps_w = [waiting_w + share * spread_w for share in sorted(shares)]
    tight, loose = (simulated(tables, decisions, Limits(average_power_w=watts)) for watts in caps_w)
    assert tight[1].step_time_s.value >= loose[1].step_time_s.value * (1 - SLACK)
    for (paced, figures), watts in zip((tight, loose), caps_w, strict=True):
        assert figures.average_power_w.value <= watts * (1 + SLACK)
        assert figures.energy_by_cause["dynamic"] == pytest.approx(free.energy_by_cause["dynamic"])
        assert figures.step_time_s.value == pytest.approx(max(paced.pace_s, free.step_time_s.value))


@SOME
@given(plan=drawn_plans(), data=st.data())
def test_a_locked_lower_clock_is_never_faster_nor_draws_more(plan: Drawn, data: st.DataObject) -> None:
    cluster = clocked_cluster()
    tables, decisions = plan.decided(cluster)
    indices = data.draw(st.tuples(*[st.integers(0, len(cluster.clocks_hz) - 1)] * 2))
    faster, slower = (
        predict(tables, replace(decisions, stages=tuple(replace(s, clock_hz=hz) for s in decisions.stages)))
        for hz in (cluster.clocks_hz[index] for index in sorted(indices))
    )
    assert slower.step_time_s.value >= faster.step_time_s.value * (1 - SLACK)
    assert slower.energy_by_cause["dynamic"] <= faster.energy_by_cause["dynamic"] * (1 + SLACK)
