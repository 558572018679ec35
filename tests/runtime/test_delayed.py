"""Products whose weight gradients wait: the same gradients, later, through the same hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autopar.ir.timeline import schedule_actions
from autopar.program.delayed import DELAYED, DelayedWeights, delayed_addmm, delayed_linear, delayed_matmul
from autopar.rewrite.program import build_stage, serial_decisions
from autopar.rules.weights import delayed_products
from tests.dist.decisions import cut_evenly
from tests.dist.models import captured

Make = Callable[[DelayedWeights, Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[Make, Make, tuple[int, ...]]] = {
    "linear": (delayed_linear, lambda d, x, w, b: functional.linear(x, w, b), (2, 3, 4)),
    "linear without bias": (lambda d, x, w, b: delayed_linear(d, x, w), lambda d, x, w, b: x @ w.t(), (5, 4)),
    "addmm": (lambda d, x, w, b: delayed_addmm(d, b, x, w.t()), lambda d, x, w, b: b + x @ w.t(), (5, 4)),
    "matmul": (lambda d, x, w, b: delayed_matmul(d, x, w.t()), lambda d, x, w, b: x @ w.t(), (2, 3, 4)),
    "cast": (
        lambda d, x, w, b: delayed_linear(d, x.float(), w.float(), b.float()),
        lambda d, x, w, b: functional.linear(x.float(), w.float(), b.float()),
        (5, 4),
    ),
}


def leaves(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (6, 4), (6,))]
    x, weight, bias = (tensor.requires_grad_() for tensor in made)
    return x, weight, bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("runs_again", [False, True])
def test_both_halves_give_what_autograd_gives(form: str, runs_again: bool) -> None:
    delayed_form, plain_form, shape = FORMS[form]
    delayed, told = DelayedWeights(), []
    found, expected = leaves(shape), leaves(shape)
    found[1].register_post_accumulate_grad_hook(told.append)

    def run() -> Tensor:
        return delayed_form(delayed, *found).square()

    made = checkpoint(run, use_reentrant=False) if runs_again else run()
    (3 * made).sum().backward()
    assert found[1].grad is None
    finish = delayed.take()
    assert (len(told), delayed.left) == (0, [])
    finish()
    (3 * plain_form(delayed, *expected).square()).sum().backward()
    assert len(told) == 1
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6 if form == "cast" else 1e-12, atol=1e-14)


def test_each_backward_has_a_second_half_of_its_own_in_its_order() -> None:
    delayed, told = DelayedWeights(), []
    weights = [torch.eye(2).requires_grad_() for _ in range(2)]
    for i, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, i=i: told.append(i))
    halves = []
    for scale in (1.0, 10.0):
        x = torch.full((1, 2), scale, requires_grad=True)
        delayed_linear(delayed, delayed_linear(delayed, x, weights[0]), weights[1]).sum().backward()
        halves.append(delayed.take())
    halves[1]()
    assert told == [1, 0]
    torch.testing.assert_close(weights[0].grad, torch.full((2, 2), 10.0))
    halves[0]()
    torch.testing.assert_close(weights[0].grad, torch.full((2, 2), 11.0))


def test_without_gradients_nothing_waits() -> None:
    delayed = DelayedWeights()
    x, weight, bias = leaves((5, 4))
    with torch.no_grad():
        delayed_linear(delayed, x, weight, bias)
    delayed_linear(delayed, x.detach(), weight, bias).sum().backward()
    assert weight.grad is not None
    assert delayed.left == []


def test_every_layer_of_a_stage_waits_but_not_a_weight_that_is_read_twice() -> None:
    """GPT-2 reads its embedding again before the loss: on one stage that product goes with the first half."""
    graph = captured("gpt2", 4).graph
    base = replace(serial_decisions(graph, 2), schedule="zero-bubble", stages=cut_evenly(graph, 2))
    counts = []
    for stage in range(2):
        program = build_stage(graph, base, stage, ())
        nodes = [node for segment in program.segments for node in segment.nodes]
        counts.append(sum(node.target in DELAYED.values() for node in nodes))
    products = [op for op in graph.ops if op.target in ("aten.addmm.default", "aten.linear.default")]
    assert sum(counts) == len(products)
    assert len(delayed_products(graph.ops, graph.values, base.parameters)) == len(products) - 1


@pytest.mark.parametrize(
    ("ranks", "count", "chunks"), [(2, 2, 1), (3, 5, 1), (3, 9, 2), (4, 8, 1), (4, 8, 3), (4, 6, 1)]
)
def test_actions_are_in_the_order_of_the_engine(ranks: int, count: int, chunks: int) -> None:
    for rank in range(ranks):
        engine = ScheduleInterleavedZeroBubble.__new__(ScheduleInterleavedZeroBubble)
        engine.pp_group_size, engine.n_local_stages, engine.rank, engine._n_microbatches = ranks, chunks, rank, count
        engine.number_of_rounds = max(1, count // ranks)
        engine.microbatches_per_round = count // engine.number_of_rounds
        actions = [action for action in engine._calculate_single_rank_operations(rank) if action is not None]
        kinds = {"F": "F", "I": "B", "W": "W"}
        theirs = [(kinds[a.computation_type.value], a.microbatch_index, a.stage_index // ranks) for a in actions]
        mine = schedule_actions(rank, ranks, count, "zero-bubble", interleave=chunks)
        assert [(a.kind, a.microbatch, a.chunk) for a in mine[:-1]] == theirs
