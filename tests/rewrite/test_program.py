"""Programs without processes: on one device they are the model itself, and they follow the plan or say why not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from autopar.errors import RewriteError
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.partition import partition
from autopar.ir.solution import Decisions, StageChoice
from autopar.planner.assemble import make_executor
from autopar.program.collectives import STEP_FUNCTIONS
from autopar.rewrite.check import check_segment
from autopar.rewrite.layout import layout_of
from autopar.rewrite.program import build_stage, program_text, replicated_decisions, serial_decisions, serial_program
from autopar.runtime.compare import relative_error
from autopar.runtime.executor import Executor
from autopar.runtime.mesh import serial_mesh
from tests.dist.decisions import cut_evenly, data_parallel, tensor_parallel
from tests.dist.models import as_double, captured, global_batch

TOYS = ("toy/mlp", "toy/transformer", "toy/conv")


@pytest.fixture(scope="module")
def transformer() -> OpGraph:
    return captured("toy/transformer", 8).graph


def executor(name: str, recompute: str = "none", num_microbatches: int = 2) -> Executor:
    found = captured(name, 8 // num_microbatches)
    outside = [v.name for v in found.graph.values.values() if v.origin in ("parameter", "buffer", "constant")]
    state = {name: as_double(found.tensor(name).detach()) for name in outside}
    decisions = serial_decisions(found.graph, num_microbatches)
    stages = (replace(decisions.stages[0], recompute=recompute),)
    return make_executor(found.graph, replace(decisions, stages=stages), state, serial_mesh())


@pytest.mark.parametrize("name", TOYS)
def test_the_serial_program_is_the_eager_model(name: str) -> None:
    found = captured(name, 8)
    module = found.module.double()
    serial = executor(name, num_microbatches=1)
    batch = global_batch(name)
    loss = module(*batch)
    loss.backward()
    assert serial.compute_gradients(batch) == pytest.approx(loss.item(), rel=1e-13)
    largest = max(float(p.grad.abs().max()) for p in module.parameters())
    for value in found.graph.parameters:
        expected = replace(found, module=module).tensor(value.name).grad
        assert relative_error(serial.store.whole_gradient(value.name), expected, largest * 1e-4) < 1e-11
    for buffer, tensor in serial.buffers.items():
        torch.testing.assert_close(tensor, replace(found, module=module).tensor(buffer), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["toy/conv", "toy/dropout"])
def test_recompute_changes_no_gradient_no_mask_and_no_buffer(name: str) -> None:
    kept, again = executor(name), executor(name, recompute="full")
    batch = global_batch(name)
    assert kept.compute_gradients(batch) == again.compute_gradients(batch)
    for parameter in kept.store.items:
        torch.testing.assert_close(
            again.store.whole_gradient(parameter), kept.store.whole_gradient(parameter), rtol=1e-12, atol=1e-15
        )
    for buffer in kept.buffers:
        assert torch.equal(again.buffers[buffer], kept.buffers[buffer])


def test_dropout_differs_by_step_and_microbatch_but_not_by_run() -> None:
    first, second = executor("toy/dropout"), executor("toy/dropout")
    batch = global_batch("toy/dropout")
    losses = [first.compute_gradients(batch) for _ in range(3)]
    assert len(set(losses)) == 3
    assert [second.compute_gradients(batch) for _ in range(3)] == losses


def test_the_text_of_a_program_names_collectives_and_strategies(transformer: OpGraph) -> None:
    decisions = tensor_parallel(transformer, stage_mesh(1, 2))
    text = program_text(build_stage(transformer, decisions, 0, (0, 1)), transformer, decisions)
    assert any(f"{function.__name__}(" in text for function in STEP_FUNCTIONS.values())
    assert "linear.default(" in text
    assert "-> loss:whole" in text
    assert "tests/dist/models.py" in text or "models.py:" in text


def test_every_op_of_the_graph_is_in_one_stage(transformer: OpGraph) -> None:
    parts = partition(transformer, cut_evenly(transformer, 3))
    own = [op.name for part in parts for _, ops in part.blocks for op in ops]
    assert sorted(own) == sorted(op.name for op in transformer.ops if not op.is_shared)
    assert parts[0].received == ()
    assert parts[-1].sent == ()
    for before, after in itertools.pairwise(parts):
        assert before.sent == after.received != ()


def test_a_value_read_two_stages_later_passes_through_the_stage_between() -> None:
    graph = captured("toy/skip", 8).graph
    parts = partition(graph, cut_evenly(graph, 3))
    assert set(parts[1].received) & set(parts[1].sent)


def test_stages_that_do_not_cover_the_blocks_are_refused(transformer: OpGraph) -> None:
    with pytest.raises(RewriteError, match="do not cover blocks"):
        partition(transformer, (StageChoice(0, 1, "none"),))


def test_a_missing_strategy_is_named(transformer: OpGraph) -> None:
    decisions = replicated_decisions(transformer, stage_mesh(2))
    name = transformer.ops[3].name
    ops = {key: value for key, value in decisions.ops.items() if key != name}
    with pytest.raises(RewriteError, match=name):
        build_stage(transformer, replace(decisions, ops=ops), 0, (0,))


def test_a_split_that_does_not_divide_is_refused(transformer: OpGraph) -> None:
    decisions = data_parallel(transformer, stage_mesh(2))
    with pytest.raises(RewriteError, match="evenly"):
        build_stage(transformer, replace(decisions, mesh=stage_mesh(3)), 0, (0,))


def test_the_check_finds_an_operand_in_the_wrong_form(transformer: OpGraph) -> None:
    decisions = data_parallel(transformer, stage_mesh(2))
    program = build_stage(transformer, decisions, 0, (0,))
    other = _with_other_strategies(transformer, decisions)
    part = partition(transformer, decisions.stages)[0]
    with pytest.raises(RewriteError, match="is not held as"):
        check_segment(program.segments[0], part.blocks[0][1], layout_of(transformer, other))


def _with_other_strategies(graph: OpGraph, decisions: Decisions) -> Decisions:
    return replace(decisions, ops=replicated_decisions(graph, decisions.mesh).ops)


def test_the_check_finds_a_missing_op(transformer: OpGraph) -> None:
    program = serial_program(transformer)
    part = partition(transformer, serial_decisions(transformer).stages)[0]
    layout = layout_of(transformer, serial_decisions(transformer))
    foreign = part.blocks[-1][1][0]
    with pytest.raises(RewriteError, match=f"{foreign.name}: missing"):
        check_segment(program.segments[0], (foreign,), layout)
