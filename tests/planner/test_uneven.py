"""Plans whose stages have meshes of their own: made by a pin, kept in a file, held against graph and cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from autopar.errors import InfeasibleError, InputError
from autopar.ir.mesh import stage_mesh
from autopar.ir.offload import Offload
from autopar.ir.pin_fields import parse_pin_fields, pin_words
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.solution import Decisions, Pins
from autopar.ir.verify import verify
from autopar.planner.plan import plan_graph
from autopar.planner.request import PlanRequest, choose_target
from autopar.planner.uneven import NOTE
from autopar.report.sharding import describe_blocks
from autopar.report.text import decision_words
from tests.toy_graphs import residual_graph

GRAPH = residual_graph(layers=4)


def plan_on(
    meshes: tuple[tuple[int, int], ...], num_gpus: int = 4, batch: int = 8, even_cuts: bool = False, **settings: Any
) -> Plan:
    pins = Pins(meshes=meshes, roles=True, num_microbatches=2, even_cuts=even_cuts)
    request = PlanRequest(num_gpus, gpu="a100-sxm-80gb", gpus_per_node=2, pins=pins, with_baselines=False, **settings)
    graph = GRAPH if batch == GRAPH.batch_size else residual_graph(batch, layers=4)
    return plan_graph(graph, ModelReference("toy", {}, "", 0), request, choose_target(request))


@pytest.mark.parametrize(
    ("meshes", "words"),
    [
        (((2, 1), (1, 2)), "pp=2, dp=2 tp=1 / dp=1 tp=2"),
        (((1, 1), (2, 1), (1, 1)), "pp=3, dp=1 tp=1 / dp=2 tp=1 / dp=1 tp=1"),
        (((2, 1), (1, 1)), "pp=2, dp=2 tp=1 / dp=1 tp=1"),
    ],
)
def test_a_pinned_plan_has_those_meshes_and_survives_its_file(meshes: tuple[tuple[int, int], ...], words: str) -> None:
    plan = plan_on(meshes)
    decisions = plan.decisions
    assert decisions.stage_meshes == tuple(stage_mesh(*mesh) for mesh in meshes)
    assert decisions.num_gpus == sum(dp * tp for dp, tp in meshes)
    assert parse_plan(dump_plan(plan)) == plan
    assert verify(plan, GRAPH) == []
    assert decision_words(plan)[0].endswith(words)
    assert NOTE in plan.notes
    assert plan.pinned is not None
    assert parse_pin_fields(plan.pinned).meshes == meshes
    assert pin_words(plan.pinned) == f"m=2, meshes={'/'.join(f'{dp}x{tp}' for dp, tp in meshes)}"
    assert describe_blocks(decisions, GRAPH)


def test_cuts_are_moved_to_where_the_plan_is_faster() -> None:
    plan, even = plan_on(((3, 1), (1, 1)), batch=6), plan_on(((3, 1), (1, 1)), batch=6, even_cuts=True)
    assert plan.predicted.step_time_s.value <= even.predicted.step_time_s.value
    assert (plan.solver.status, plan.solver.bound) == ("feasible", 0.0)


CHANGES: dict[str, Callable[[Decisions], dict[str, Any]]] = {
    "expected one mesh for each": lambda d: {"stage_meshes": d.stage_meshes[:1]},
    "equal names of axes": lambda d: {"stage_meshes": (d.mesh, stage_mesh(1))},
    "several chunks per rank": lambda d: {"interleave": 2},
    "offload": lambda d: {"offload": Offload(optimizer="host")},
    "does not divide": lambda d: {"stage_meshes": (d.mesh, stage_mesh(1, 3))},
}


@pytest.mark.parametrize("problem", CHANGES)
def test_what_does_not_go_with_them_is_found(problem: str) -> None:
    plan = plan_on(((2, 1), (1, 2)), 8)
    changed = replace(plan, decisions=replace(plan.decisions, **CHANGES[problem](plan.decisions)))
    assert any(problem in issue.problem for issue in verify(changed, GRAPH))


@pytest.mark.parametrize(
    ("meshes", "message"),
    [
        (((2, 2), (1, 2)), "needs 6 GPUs, there are 4"),
        (((1, 1),) * 9, "needs 9 GPUs"),
        (((3, 1), (1, 1)), "does not divide"),
    ],
)
def test_meshes_that_cannot_be_are_refused_in_one_line(meshes: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan_on(meshes)
    assert "\n" not in str(caught.value)


def test_schedules_that_such_stages_do_not_run_are_refused() -> None:
    pins = Pins(meshes=((2, 1), (1, 2)), roles=True, schedule="zero-bubble")
    request = PlanRequest(4, gpu="a100-sxm-80gb", pins=pins, with_baselines=False)
    with pytest.raises(InputError, match="such stages run 1f1b and gpipe alone"):
        plan_graph(GRAPH, ModelReference("toy", {}, "", 0), request, choose_target(request))


def test_memory_that_does_not_suffice_is_said() -> None:
    with pytest.raises(InfeasibleError, match="memory binds"):
        plan_on(((2, 1), (1, 1)), memory_bytes=1000)
