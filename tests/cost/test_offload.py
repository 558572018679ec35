"""Prices of what is offloaded, against closed forms; moves beside computation, against their bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cli.pins import parse_pins
from autopar.cost.hardware import Cluster, load_cluster
from autopar.cost.offload import offload_price
from autopar.cost.predict import predict
from autopar.cost.table import CostTables
from autopar.errors import InfeasibleError, InputError, PlanMismatchError
from autopar.ir.graph import OpGraph
from autopar.ir.offload import Offload
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.solution import Pins
from autopar.ir.streams import BlockWork, Overlap, stage_times
from autopar.planner.plan import ModelReference, plan_graph
from autopar.planner.request import PlanRequest, choose_target
from autopar.planner.software import chosen_software
from tests.toy_graphs import mlp_graph

SECONDS = st.floats(0.0, 8.0)
BLOCKS = st.lists(st.builds(BlockWork, SECONDS, SECONDS, out_s=SECONDS, back_s=SECONDS), min_size=1, max_size=5)


def chain_graph() -> OpGraph:
    """Three layers whose states are 32 MiB each: more than one shard."""
    return mlp_graph(8, (2048,) * 4, bias=False)


def plan_of(graph: OpGraph, pins: str, gpu: str = "h100-sxm-80gb", memory_bytes: int | None = None) -> Plan:
    request = PlanRequest(
        1, gpu=gpu, memory_bytes=memory_bytes, pins=parse_pins(pins).pins, profile="none", with_baselines=False
    )
    return plan_graph(graph, ModelReference("toy", {}, "", 0), request, choose_target(request))


def optimizer_bytes(graph: OpGraph) -> float:
    """AdamW keeps two states of each parameter's size."""
    return 2.0 * sum(value.meta.num_bytes for value in graph.parameters)


@given(BLOCKS)
def test_moves_beside_computation_take_at_least_either_and_at_most_both(blocks: list[BlockWork]) -> None:
    beside, after = (stage_times(blocks, Overlap(offload=hides)) for hides in (True, False))
    for name, moved in (("forward_s", "out_s"), ("backward_s", "back_s")):
        compute, moves = sum(getattr(b, name) for b in blocks), sum(getattr(b, moved) for b in blocks)
        assert max(compute, moves) * (1 - 1e-9) <= getattr(beside, name) <= (compute + moves) * (1 + 1e-9)
        assert getattr(after, name) == pytest.approx(compute + moves)


def test_the_first_moves_back_and_the_last_out_are_waited_for() -> None:
    blocks = [BlockWork(2.0, 4.0, out_s=1.0, back_s=3.0)] * 3
    times = stage_times(blocks, Overlap(offload=True))
    assert (times.forward_s, times.backward_s) == (3 * 2.0 + 1.0, 3.0 + 3 * 4.0)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_states_leave_the_device_and_cost_their_way_there_and_back(place: str) -> None:
    graph = chain_graph()
    cluster = load_cluster("h100-sxm-80gb", 1)
    plain, offloaded = (plan_of(graph, f"dp=1,pp=1,m=1{extra}") for extra in ("", f",offload_optimizer={place}"))
    size, price = optimizer_bytes(graph), offload_price(cluster, place)
    assert price is not None
    (before,), (after,) = plain.predicted.stages, offloaded.predicted.stages
    assert after.offloaded == {"optimizer": size}
    assert after.memory_by_cause["optimizer"] == 0
    assert before.memory_by_cause["optimizer"] == size
    assert after.step_s.value - before.step_s.value == pytest.approx(2 * size * price.s_per_byte)
    dynamic = [plan.predicted.energy_by_cause["dynamic"] for plan in (plain, offloaded)]
    assert dynamic[1] - dynamic[0] == pytest.approx(2 * size * price.j_per_byte)


def test_disks_are_shared_by_a_node_and_reached_over_the_link() -> None:
    cluster = load_cluster("h100-sxm-80gb", 8)
    link, disk = cluster.spec.host_link, cluster.spec.disk
    assert link is not None
    assert disk is not None
    host, far = offload_price(cluster, "host"), offload_price(cluster, "disk")
    assert host is not None
    assert far is not None
    assert host.s_per_byte == pytest.approx(1 / link.bytes_per_s)
    assert far.s_per_byte == pytest.approx(1 / link.bytes_per_s + 8 / disk.bytes_per_s)
    assert (host.hides, far.hides) == (True, False)


def test_the_memory_of_a_cpu_is_that_of_its_host() -> None:
    graph = chain_graph()
    plain, host, disk = (
        plan_of(graph, f"dp=1,pp=1,m=1{extra}", "cpu").predicted
        for extra in ("", ",offload_optimizer=host", ",offload_optimizer=disk")
    )
    assert host.stages[0].memory_by_cause["optimizer"] == plain.stages[0].memory_by_cause["optimizer"]
    assert host.peak_memory_bytes[0].value >= plain.peak_memory_bytes[0].value
    assert disk.stages[0].memory_by_cause["optimizer"] == 0
    assert host.step_time_s.value > plain.step_time_s.value


def test_a_device_without_numbers_offloads_nothing() -> None:
    cluster = load_cluster("cpu", 1)
    blind: Cluster = replace(cluster, spec=replace(cluster.spec, host_link=None))
    with pytest.raises(InputError, match=r"host_link\.bandwidth_bytes_per_s"):
        offload_price(blind, "host")


def test_a_plan_is_priced_by_tables_of_its_own_offload_alone() -> None:
    graph = chain_graph()
    plan = plan_of(graph, "dp=1,pp=1,m=1,offload_optimizer=host")
    with pytest.raises(PlanMismatchError, match="optimizer states to host"):
        predict(CostTables(graph, load_cluster("h100-sxm-80gb", 1)), plan.decisions)


def test_the_file_says_what_is_offloaded_and_older_files_do_not() -> None:
    graph = chain_graph()
    plan = plan_of(graph, "dp=1,pp=1,m=1,offload_optimizer=disk,offload_activations=host")
    assert plan.decisions.offload == Offload("disk", "host")
    assert parse_plan(dump_plan(plan)) == plan
    assert '"offload"' not in dump_plan(plan_of(graph, "dp=1,pp=1,m=1"))
    with pytest.raises(PlanMismatchError, match="tape"):
        parse_plan(dump_plan(plan).replace('"optimizer": "disk"', '"optimizer": "tape"'))


def test_too_little_memory_names_the_offload_that_makes_a_plan_fit() -> None:
    graph = chain_graph()
    least = plan_of(graph, "dp=1,pp=1").predicted.peak_memory_bytes[0].value
    room = int(least - 0.5 * optimizer_bytes(graph))
    with pytest.raises(InfeasibleError) as error:
        plan_of(graph, "dp=1,pp=1,m=1,recompute=none", memory_bytes=room)
    assert "--pin offload_optimizer=host" in str(error.value)
    fits = plan_of(graph, "dp=1,pp=1,m=1,recompute=none,offload_optimizer=host", memory_bytes=room)
    assert fits.predicted.peak_memory_bytes[0].value <= room


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ("offload_activations=host,recompute=full", "either of the two"),
        ("offload_activations=host,compile=on", "compiled stage"),
    ],
)
def test_what_does_not_go_together_is_refused_when_planning(pins: str, words: str) -> None:
    pinned = parse_pins(pins)
    software = chosen_software(pinned.software, pinned.switches, None)
    request = PlanRequest(1, gpu="h100-sxm-80gb", pins=pinned.pins, profile="none", software=software)
    with pytest.raises(InputError, match=words):
        plan_graph(chain_graph(), ModelReference("toy", {}, "", 0), request, choose_target(request))


def test_an_optimizer_without_state_has_nothing_to_offload() -> None:
    with pytest.raises(InputError, match="sgd keeps no state"):
        plan_of(replace(chain_graph(), optimizer="sgd"), "offload_optimizer=host")


def test_a_pin_with_a_slip_is_named() -> None:
    request = PlanRequest(1, gpu="cpu", pins=Pins(offload_optimizer="tape"), profile="none")
    with pytest.raises(InputError, match="expected one of host, disk"):
        plan_graph(chain_graph(), ModelReference("toy", {}, "", 0), request, choose_target(request))
    with pytest.raises(InputError, match="did you mean offload_optimizer"):
        parse_pins("offload_optimiser=host")
    with pytest.raises(InputError, match="expected one of host, disk"):
        parse_pins("offload_optimizer=tape")
