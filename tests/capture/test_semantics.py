"""In-place writes, no_grad, detach, dropout, constants, functional models: small models with one trait each."""

from __future__ import annotations

import copy
from functools import partial
from types import FunctionType

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autopar.capture.export import Captured, capture
from autopar.capture.model_source import ModelSource
from autopar.errors import CaptureError, InputError
from tests.capture.interpreter import run_graph


class Trait(nn.Module):
    """A linear layer, a bias and a buffer for the forward functions below to play with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("memory", torch.ones(4))


def trait_source(function, user_file: str | None = None) -> ModelSource:
    """Source of a `Trait` with that function as its forward (under that name, as torch records lines of forwards)."""
    code = function.__code__.replace(co_name="forward")
    forward = FunctionType(code, function.__globals__, "forward", None, function.__closure__)
    model = type("WithForward", (Trait,), {"forward": forward})
    return ModelSource("trait", "trait.py", model, lambda: torch.arange(32.0).reshape(8, 4) / 10, user_file=user_file)


def check(forward, tolerance: float = 1e-6) -> Captured:
    """Graph and eager model agree on loss, gradients and buffers; the capture is returned."""
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    torch.manual_seed(0)
    captured = capture(trait_source(forward), device="cpu")
    eager = copy.deepcopy(captured.module)
    expected = eager(*[t.clone() for t in captured.inputs])
    expected.backward()
    loss = run_graph(captured)[captured.graph.loss]
    loss.backward()
    close(loss, expected)
    for mine, theirs in zip(captured.module.parameters(), eager.parameters(), strict=True):
        close(mine.grad if mine.grad is not None else 0 * mine, theirs.grad if theirs.grad is not None else 0 * theirs)
    for mine, theirs in zip(captured.module.buffers(), eager.buffers(), strict=True):
        close(mine, theirs)
    return captured


def relu_in_place(model, x):
    y = model.layer(x)
    z = y * 2
    y.relu_()
    return (y * z).sum()


def write_rows(model, x):
    y = model.layer(x) * 1
    y[:, 0] = 3.0
    y[1:3] *= 2
    return (y * y).mean()


def read_an_older_view(model, x):
    y = model.layer(x) * 1
    head = y[:, :2]
    y.mul_(2)
    return (head * head).sum() + y.sum()


def write_through_a_transpose(model, x):
    y = (model.layer(x) * 1).t()
    y[0].add_(1)
    return (y * y).mean()


def without_gradient(model, x):
    with torch.no_grad():
        scale = model.layer(x).abs().amax()
    return (model.layer(x) / scale * model.bias.detach()).sum()


def keep_dtype(model, x):
    y = model.layer(x).to(torch.bfloat16)
    y.mul_(model.bias)
    return y.float().sum()


def constants(model, x):
    return (model.layer(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum() + torch.arange(4, dtype=torch.float32).sum()


def update_buffer(model, x):
    y = model.layer(x)
    model.memory.mul_(0.5)
    return (y * model.memory).sum()


def write_input(model, x):
    x.clamp_(min=1)
    return model.layer(x).sum()


def checkpointed(model, x):
    return checkpoint(model.layer, x, use_reentrant=False).sum()


FORWARDS = (
    checkpointed,
    constants,
    keep_dtype,
    read_an_older_view,
    relu_in_place,
    without_gradient,
    write_input,
    write_rows,
    write_through_a_transpose,
)


@pytest.mark.parametrize("forward", FORWARDS)
def test_graph_equals_eager(forward) -> None:
    check(forward, tolerance=1e-2 if forward is keep_dtype else 1e-6)


def test_no_grad_becomes_detach() -> None:
    graph = check(without_gradient).graph
    (scale,) = [v for v in graph.values.values() if v.name == "amax"]
    assert not scale.requires_grad
    assert any(op.target == "aten.detach.default" for op in graph.ops)


def test_buffer_update_is_recorded() -> None:
    graph = check(update_buffer).graph
    assert [op.mutates for op in graph.ops if op.mutates] == [("b_memory",)]


def test_constants_are_kept_by_name() -> None:
    captured = check(constants)
    (value,) = captured.graph.outside("constant")
    assert captured.constants[value.name].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_dropout_that_drops_nothing_is_no_op() -> None:
    def forward(model, x):
        return functional.dropout(model.layer(x), 0.0).sum()

    assert [op.target for op in check(forward).graph.ops] == ["aten.linear.default", "aten.sum.default"]


def test_dropout_keeps_a_mask_and_is_not_shared() -> None:
    graph = capture(trait_source(lambda model, x: model.layer(functional.dropout(x, 0.5)).sum())).graph
    (dropout,) = [op for op in graph.ops if op.target == "aten.dropout.default"]
    assert not dropout.is_shared
    assert not graph.values[dropout.outputs[0]].requires_grad


def test_float64_capture_has_no_other_float() -> None:
    captured = capture(trait_source(keep_dtype), device="cpu", dtype=torch.float64)
    dtypes = {v.meta.dtype for v in captured.graph.values.values()}
    assert dtypes == {"float64"}
    assert run_graph(captured)[captured.graph.loss].dtype == torch.float64


def test_a_model_without_containers_is_cut_at_waists() -> None:
    def forward(model, x):
        for _ in range(6):
            x = functional.gelu(model.layer(x))
        return x.sum()

    graph = capture(trait_source(forward)).graph
    assert len(graph.blocks) == 6


def user_line(forward) -> int:
    return forward.__code__.co_firstlineno


def branch_on_data(model, x):
    if model.layer(x).sum() > 0:
        return x.sum()
    return model.layer(x).sum()


def shape_from_data(model, x):
    y = model.layer(x)
    return y[y > 0].sum()


def item(model, x):
    return model.layer(x).sum() * int(model.bias.argmax().item())


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model.layer(x).float().sum()


def write_parameter(model, x):
    with torch.no_grad():
        model.bias.mul_(2)
    return (model.layer(x) + model.bias).sum()


def write_part_of_a_buffer(model, x):
    model.memory[0].add_(1)
    return (model.layer(x) * model.memory).sum()


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def own_gradient(model, x):
    return StraightThrough.apply(model.layer(x)).sum()


def hooked(model, x):
    y = model.layer(x)
    y.register_hook(lambda gradient: 2 * gradient)
    return y.sum()


def reentrant_checkpoint(model, x):
    return checkpoint(model.layer, x, use_reentrant=True).sum()


def write_under_no_grad(model, x):
    y = model.layer(x)
    with torch.no_grad():
        y.zero_()
    return y.sum()


@pytest.mark.parametrize(
    ("forward", "line", "word"),
    [
        (branch_on_data, 1, "depends on the values of a tensor"),
        (shape_from_data, 2, "aten.index.Tensor"),
        (item, 1, "item"),
        (autocast, 2, "autocast"),
        (write_parameter, 2, "a parameter, or a part of it, is changed in place"),
        (own_gradient, 1, "autograd.Function StraightThrough"),
        (hooked, 2, "register_hook"),
        (reentrant_checkpoint, 1, "gradient of its own"),
        (write_under_no_grad, 3, "changed in place under no_grad"),
        (write_part_of_a_buffer, 1, "a buffer, or a part of it, is changed in place"),
    ],
)
def test_what_cannot_be_captured_names_line_and_reason(forward, line: int, word: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(trait_source(forward, user_file=__file__))
    message = str(caught.value)
    assert word in message
    assert f"{__file__}:{user_line(forward) + line}" in message
    assert "Traceback" not in message


def test_loss_without_trainable_parameters() -> None:
    with pytest.raises(CaptureError, match="does not depend on any trainable parameter"):
        capture(trait_source(lambda _, x: x.sum()))


def test_output_without_loss() -> None:
    with pytest.raises(InputError, match=r"shape \(8, 4\).*define loss\(output, batch\)"):
        capture(trait_source(lambda model, x: model.layer(x)))
