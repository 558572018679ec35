"""Every strategy of every rule, run on pretended ranks in one process and compared with the whole op.

Operands are placed as the strategy says, each rank runs its local call, results and gradients are put together again
by what their placements mean. Collectives are not needed, because a placement defines what the ranks hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch

from autopar.ir.graph import Op, Value
from autopar.ir.strategy import Strategy, input_sharding, output_sharding
from autopar.program.collectives import AxisGroup
from autopar.program.local_ops import LOCAL_OPERATIONS, NEEDS_MEMBERS
from autopar.rules.experts import EXCHANGING
from autopar.rules.local import LocalCall
from autopar.rules.local_call import local_call
from autopar.rules.strategies import axis_strategies, has_rule, local_metas
from tests.pretend import gather, place
from tests.rules_cases import CASES, Case, build, call, fill


def strategies_on(case: Case, sizes: tuple[int, ...]) -> list[Strategy]:
    op, values, _ = build(case)
    combined = itertools.product(axis_strategies(op, values), repeat=len(sizes))
    return [s for s in combined if local_metas(op, s, sizes, values) is not None]


def check(case: Case, strategy: Strategy, sizes: tuple[int, ...]) -> None:
    op, values, tensors = build(case)
    check_op(op, values, tensors, strategy, sizes, lambda wholes: call(op.target, op.args, dict(op.kwargs), wholes))


def check_op(  # noqa: PLR0917 - one case
    op: Op,
    values: Mapping[str, Value],
    tensors: list[torch.Tensor],
    strategy: Strategy,
    sizes: tuple[int, ...],
    run_whole: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    core: object = None,
) -> None:
    """The local calls of all ranks, put together, against the whole op: results and gradients."""
    torch.manual_seed(1)
    grads = [values[name].requires_grad for name in op.inputs]
    wholes = [t.clone().requires_grad_(g) for t, g in zip(tensors, grads, strict=True)]
    expected = run_whole(wholes)
    held = [place(t, input_sharding(strategy, i), sizes, "P") for i, t in enumerate(tensors)]
    ranks = [
        [t.detach().clone().requires_grad_(g) for t, g in zip(r, grads, strict=True)] for r in zip(*held, strict=True)
    ]
    local = local_call(op, strategy, sizes, values)
    results = [
        [y * local.scale if local.scale != 1.0 else y for y in run_local(local, r, rank, sizes, core)]
        for rank, r in enumerate(ranks)
    ]
    for i, whole in enumerate(expected):
        found = gather([r[i] for r in results], output_sharding(strategy, i), sizes, "P")
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)
    smooth = [i for i, y in enumerate(expected) if y.requires_grad]
    if smooth:
        run_backward(strategy, sizes, expected, results)
        check_gradients(strategy, sizes, wholes, ranks)


def run_local(
    local: LocalCall, tensors: list[torch.Tensor], rank: int, sizes: tuple[int, ...], core: object = None
) -> list[torch.Tensor]:
    """The call of one rank; its axes have a position but no processes, so nothing may be communicated inside."""
    if local.target not in LOCAL_OPERATIONS:
        return call(local.target, local.args, dict(local.kwargs), tensors)
    axes = []
    for size in reversed(sizes):
        rank, index = divmod(rank, size)
        axes.insert(0, AxisGroup(f"axis{len(axes)}", size, index))
    kwargs = {
        key: tuple(axes[i] for i in arg) if key.endswith("_axes") else fill(arg, tensors)
        for key, arg in local.kwargs.items()
    }
    if local.target in NEEDS_MEMBERS:
        kwargs["core"] = core
    return [LOCAL_OPERATIONS[local.target](*fill(local.args, tensors), **kwargs)]


def run_backward(
    strategy: Strategy, sizes: tuple[int, ...], expected: list[torch.Tensor], results: list[list[torch.Tensor]]
) -> None:
    """Backward of the whole op and of every rank from one random cotangent."""
    smooth = [i for i, y in enumerate(expected) if y.requires_grad]
    cotangents = {i: torch.rand_like(expected[i]) for i in smooth}
    torch.autograd.backward([expected[i] for i in smooth], [cotangents[i] for i in smooth])
    local = {i: place(cotangents[i], output_sharding(strategy, i), sizes, "R") for i in smooth}
    for rank, ys in enumerate(results):
        torch.autograd.backward([ys[i] for i in smooth], [local[i][rank] for i in smooth])


def check_gradients(
    strategy: Strategy, sizes: tuple[int, ...], wholes: list[torch.Tensor], ranks: list[list[torch.Tensor]]
) -> None:
    for i, whole in enumerate(wholes):
        if whole.grad is None:
            continue
        gradients = [r[i].grad if r[i].grad is not None else torch.zeros_like(r[i]) for r in ranks]
        found = gather(gradients, input_sharding(strategy, i), sizes, "R")
        torch.testing.assert_close(found, whole.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_strategy_computes_what_the_whole_op_computes(case: Case) -> None:
    assert has_rule(case.target)
    checked = 0
    for sizes in ((2,), (4,), (2, 2)):
        for strategy in strategies_on(case, sizes):
            if any(axis.label in EXCHANGING for axis in strategy):
                continue  # ranks send rows to one another: run on real processes
            check(case, strategy, sizes)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_work_is_split_somewhere(case: Case) -> None:
    op, values, _ = build(case)
    assert any(strategy.splits_work for strategy in axis_strategies(op, values, 2))
