"""The graph is the model: executing its ops gives the eager model's loss, gradients and buffers."""

from __future__ import annotations

import copy

import pytest
import torch

from autopar.capture.export import Captured, capture
from autopar.ir.graph import Op
from tests.capture.interpreter import outside_tensors, run_graph, run_op
from tests.capture.models import NAMES, planned, source

KEEPS_FLOAT32 = ("gpt2", "llama", "t5", "mixtral")
"""Models whose code casts to float32 inside: eager float64 is no better than float32 there."""


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def captured_and_eager(name: str) -> tuple[Captured, torch.nn.Module, torch.Tensor]:
    """A float64 capture on the CPU, a copy of its module after an eager step, and that step's loss."""
    torch.manual_seed(0)
    captured = capture(source(name), device="cpu", dtype=torch.float64)
    eager = copy.deepcopy(captured.module)
    if name == "mixtral":
        eager.model.set_experts_implementation("batched_mm")
    args, kwargs = source(name).example_batch()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    kwargs = {key: a.double() if a.is_floating_point() else a for key, a in kwargs.items()}
    loss = eager(*args, **kwargs)
    loss.backward()
    return captured, eager, loss


@pytest.mark.parametrize("name", NAMES)
def test_graph_gives_loss_gradients_and_buffers_of_the_eager_model(name: str) -> None:
    captured, eager, expected = captured_and_eager(name)
    values = run_graph(captured)
    for value in captured.graph.values.values():
        tensor = values[value.name]
        assert tuple(tensor.shape) == value.meta.shape, value.name
        assert str(tensor.dtype) == f"torch.{value.meta.dtype}", value.name
        assert tensor.requires_grad == value.requires_grad, value.name
    loss = values[captured.graph.loss]
    loss.backward()
    tolerance = 2e-6 if name in KEEPS_FLOAT32 else 1e-12
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=tolerance, atol=0)
    for key, gradient in gradients(eager).items():
        mine = gradients(captured.module)[key]
        torch.testing.assert_close(mine, gradient, rtol=0, atol=tolerance * float(1e-9 + gradient.abs().max()), msg=key)
    for (key, mine), theirs in zip(captured.module.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=key)


def test_batch_norm_updates_are_recorded() -> None:
    graph = planned("resnet").graph
    mutated = {name for op in graph.ops for name in op.mutates}
    fqns = {graph.values[name].fqn.rpartition(".")[2] for name in mutated}
    assert fqns == {"running_mean", "running_var", "num_batches_tracked"}
    assert all(graph.values[name].origin == "buffer" for name in mutated)


def region_and_values() -> tuple[Op, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    captured = capture(source("mixtral"), device="cpu", dtype="float64")
    region = next(op for op in captured.graph.ops if op.target == "autopar.moe_experts")
    return region, {name: t.detach() for name, t in run_graph(captured).items()}


def test_experts_region_on_half_of_the_tokens_is_half_of_the_result() -> None:
    """Token counts in the members' arguments are replaced, as `token_counts` announces."""
    region, values = region_and_values()
    pairs, tokens = region.kwargs["token_counts"]
    assert (pairs, tokens) == (128, 64)
    for half in (0, 1):
        env = {}
        for name in region.inputs:
            tensor = values[name]
            is_parameter = name.startswith("p_")
            env[name] = tensor if is_parameter else tensor.chunk(2)[half]
        for member in region.members:
            args = tuple(arg // 2 if arg in (pairs, tokens) and isinstance(arg, int) else arg for arg in member.args)
            run_op(Op(member.name, member.target, member.inputs, member.outputs, args, member.kwargs), env)
        (output,) = region.outputs
        torch.testing.assert_close(env[output], values[output].chunk(2)[half], rtol=1e-12, atol=1e-14)


def test_every_layer_has_one_experts_region_and_no_loose_parts() -> None:
    graph = planned("mixtral").graph
    assert sum(op.target == "autopar.moe_experts" for op in graph.ops) == 2
    assert not any(op.target.startswith(("aten.sort", "aten.histc", "transformers.")) for op in graph.ops)


def test_outside_tensors_are_found_by_name() -> None:
    captured = capture(source("mlp"), device="cpu")
    tensors = outside_tensors(captured)
    assert tensors["p_layers_0_weight"] is captured.module.model.layers[0].weight
    assert [v.batch_dim for v in captured.graph.outside("input")] == [0]
