"""Recompute policies change what is kept and what runs twice, and nothing else."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.capture.export import capture
from autopar.capture.model_source import ModelSource
from autopar.cost.recompute import recomputed
from autopar.ir.graph import Op, OpGraph
from autopar.ir.solution import RECOMPUTE
from autopar.planner.assemble import make_executor
from autopar.program.recompute import keep_output
from autopar.rewrite.program import build_stage, serial_decisions
from autopar.rules.recompute import attention_cores, block_ops, core_ops, recompute_by_block, with_cores_together
from autopar.runtime.executor import Executor
from autopar.runtime.mesh import serial_mesh
from autopar.runtime.microbatches import split_batch
from autopar.torch_adapter import intercept, op_name
from tests.dist.models import as_double, captured, global_batch

MODELS = ("toy/transformer", "toy/dropout", "toy/conv", "gpt2", "t5", "mixtral")


def executor(name: str, policy: str, num_microbatches: int = 2) -> Executor:
    found = captured(name, 8 // num_microbatches)
    outside = [v.name for v in found.graph.values.values() if v.origin in ("parameter", "buffer", "constant")]
    state = {name: as_double(found.tensor(name).detach()) for name in outside}
    decisions = serial_decisions(found.graph, num_microbatches)
    stages = (replace(decisions.stages[0], recompute=policy),)
    return make_executor(found.graph, replace(decisions, stages=stages), state, serial_mesh())


@pytest.mark.parametrize(("name", "policy"), [*itertools.product(MODELS, RECOMPUTE[1:])])
def test_a_policy_changes_no_loss_no_gradient_and_no_buffer(name: str, policy: str) -> None:
    kept, again = executor(name, "none"), executor(name, policy)
    batch = global_batch(name)
    assert kept.compute_gradients(batch) == again.compute_gradients(batch)
    for parameter in kept.store.items:
        found, expected = (e.store.whole_gradient(parameter) for e in (again, kept))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    for buffer in kept.buffers:
        assert torch.equal(again.buffers[buffer], kept.buffers[buffer])


class Counting:
    """Calls of products and attention in one forward and backward, and bytes that autograd keeps for it."""

    def __init__(self, name: str, policy: str) -> None:
        self.calls: Counter[str] = Counter()
        self.kept: dict[int, int] = {}
        run = executor(name, policy, 1)
        parameters = {t.untyped_storage().data_ptr() for t in run.store.leaves.values()}
        (runner,) = run.runners
        runner.feed(split_batch(run.graph.outside("input"), 1, global_batch(name)))
        with intercept(self._count), torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x):
            loss = runner()
            forward = Counter(self.calls)
            loss.backward()
        self.forward, self.backward = forward, self.calls - forward
        self.kept_bytes = sum(size for where, size in self.kept.items() if where not in parameters)

    def _count(self, overload: Any, args: Any, kwargs: Any) -> Any:
        self.calls[op_name(overload)] += 1
        return overload(*args, **kwargs)

    def _keep(self, x: Tensor) -> Tensor:
        self.kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def test_selective_runs_attention_again_and_nothing_else() -> None:
    none, selective = Counting("gpt2", "none"), Counting("gpt2", "selective")
    assert none.forward == selective.forward
    extra = selective.backward - none.backward
    assert extra[ATTENTION] == none.forward[ATTENTION] == 2
    assert not {name for name in extra if "mm" in name or "gelu" in name or "layer_norm" in name}


def test_selective_by_op_runs_every_second_product_again_and_attention_never() -> None:
    none, by_op = Counting("gpt2", "none"), Counting("gpt2", "selective-op")
    extra = by_op.backward - none.backward
    per_layer = 4  # queries, keys and values in one; output; up; down: the second runs again, the last has no reader
    assert none.forward["addmm"] == 2 * per_layer
    assert extra["addmm"] == 2
    assert extra[ATTENTION] == 0
    assert extra["gelu"] + extra["tanh"] > 0


def test_alternate_runs_the_second_of_two_layers_again() -> None:
    none, alternate = Counting("gpt2", "none"), Counting("gpt2", "alternate")
    extra = alternate.backward - none.backward
    assert extra[ATTENTION] == 1
    assert extra["native_layer_norm"] == none.forward["native_layer_norm"] // 2


def test_policies_that_keep_less_hold_less() -> None:
    held = {policy: Counting("gpt2", policy).kept_bytes for policy in RECOMPUTE}
    assert held["full"] < held["alternate"] < held["none"]
    assert held["selective-op"] < held["none"]
    assert held["selective"] <= held["none"]


class Unfused(nn.Module):
    """Attention in the old way: products, scale, mask, softmax; the values are projected after the scores are made."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.parts[0](x), self.parts[1](x)
        scores = queries @ keys.transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))
        mixed = functional.dropout(scores.softmax(-1), 0.25) @ self.parts[2](x)
        return self.parts[3](mixed)


def unfused() -> OpGraph:
    source = ModelSource(
        "unfused",
        "unfused",
        lambda: nn.Sequential(Unfused(), Unfused()),
        lambda: (torch.randn(2, 4, 8), torch.randn(2, 4, 8)),
        lambda output, batch: functional.mse_loss(output, batch[1]),
    )
    return capture(source, batch_size=2).graph


def targets(ops: tuple[Op, ...]) -> list[str]:
    return [op.target.split(".")[1] for op in ops]


def test_an_unfused_core_goes_from_the_scores_to_the_mixed_values() -> None:
    graph = unfused()
    cores = [c for block in graph.blocks for c in attention_cores(block_ops(graph, block), graph.values)]
    assert len(cores) == 2
    for core in cores:
        assert targets(core)[0] == targets(core)[-1] == "matmul"
        assert {"softmax", "masked_fill", "dropout"} <= set(targets(core))
        assert "linear" not in targets(core)


def test_cores_stand_together_in_an_order_that_can_run() -> None:
    graph = unfused()
    for block in graph.blocks:
        ops = block_ops(graph, block)
        cores = attention_cores(ops, graph.values)
        groups = with_cores_together(ops, cores)
        assert [group for group in groups if len(group) > 1] == list(cores)
        ordered = [op for group in groups for op in group]
        assert sorted(op.name for op in ordered) == sorted(op.name for op in ops)
        made: set[str] = {name for name, v in graph.values.items() if v.origin != "op"}
        made |= {name for op in graph.ops if op not in ops for name in op.outputs}
        for op in ordered:
            assert made.issuperset(op.inputs)
            made |= set(op.outputs)


def test_ops_that_would_have_to_run_between_split_a_core() -> None:
    graph = captured("toy/transformer", 8).graph
    block = max(graph.blocks, key=lambda b: b.stop - b.start)
    ops = block_ops(graph, block)
    names = core_ops(ops, graph.values)
    assert [op.name for core in attention_cores(ops, graph.values) for op in core] == [
        op.name for op in ops if op.name in names
    ]


def test_partial_policies_work_on_layers_alone() -> None:
    graph = captured("gpt2", 4).graph
    layers = {b.index for b in graph.blocks if b.name.startswith("transformer.h.")}
    assert set(recompute_by_block(graph, "selective")) == set(recompute_by_block(graph, "selective-op")) == layers
    assert set(recompute_by_block(graph, "alternate")) == {max(layers)}
    assert set(recompute_by_block(graph, "full")) == {b.index for b in graph.blocks}
    assert recompute_by_block(graph, "none") == {}


@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral"])
def test_the_program_runs_again_what_the_cost_model_prices(name: str) -> None:
    graph = captured(name, 4).graph
    for policy in ("selective", "selective-op"):
        decisions = serial_decisions(graph)
        stages = (replace(decisions.stages[0], recompute=policy),)
        program = build_stage(graph, replace(decisions, stages=stages), 0, ())
        priced = {op for op, again in recomputed(graph, policy).items() if again.reruns}
        kept, whole, parts = set(), set(), set()
        for segment in program.segments:
            outer = {node.meta["op"]: node for node in segment.module.graph.nodes if "op" in node.meta}
            parts |= {node.meta["op"] for node in segment.nodes if "op" in node.meta} - set(outer)
            kept |= {op for op, node in outer.items() if node.target is keep_output}
            whole |= set(outer) if segment.runs_again else set()
        if policy == "selective":
            assert priced == parts
            assert not whole
        else:
            members = {member.name for op in graph.ops for member in op.members}
            last_ones = whole - kept - members - priced  # after the last result that backward needs
            assert priced <= (whole | {op.name for op in graph.ops if op.members}) - kept
            assert len(last_ones) <= 3 * len(program.segments)
