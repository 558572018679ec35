"""Running a piece of a program again in backward instead of keeping what it saves.

`checkpointed` keeps the inputs of a piece; `run_again` does so for a part of a segment, as a node of it. Inside a
piece, results of calls through `keep_output` are kept as well: the second run takes them in place of computing, so
that only what those calls read is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from autopar.program.stream import StreamState
from autopar.torch_adapter import intercept, op_name

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_addmm_activation")
ATTENTION = "_scaled_dot_product_"


@dataclass
class Keeper:
    """Results kept for the piece that runs now, in the order of its calls; None outside of pieces."""

    results: deque[Any] | None = None
    is_second_run: bool = False

    @contextmanager
    def during(self, results: deque[Any], *, is_second_run: bool) -> Iterator[None]:
        before = self.results, self.is_second_run
        self.results, self.is_second_run = results, is_second_run
        try:
            yield
        finally:
            self.results, self.is_second_run = before


def checkpointed(
    run: Callable[[], tuple[Tensor, ...]], stream: StreamState, keeper: Keeper, microbatch: int
) -> tuple[Tensor, ...]:
    """The results of `run`, which backward runs again at the same position of the streams.

    Its inputs are bound in it, not passed: autograd would object to buffers that change between the two runs.
    """
    results: deque[Any] = deque()
    runs = 0

    def once() -> tuple[Tensor, ...]:
        nonlocal runs
        runs += 1
        is_second = runs > 1
        with stream.at(microbatch, is_recomputing=is_second), keeper.during(results, is_second_run=is_second):
            return run()

    found: tuple[Tensor, ...] = checkpoint(once, use_reentrant=False, preserve_rng_state=False)
    return found


def run_again(module: fx.GraphModule, stream: StreamState, keeper: Keeper, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`module(*inputs)`, of which only the inputs are kept for backward."""
    if not torch.is_grad_enabled():
        return module.forward(*inputs)  # type: ignore[no-any-return]
    return checkpointed(lambda: module.forward(*inputs), stream, keeper, stream.microbatch)


def keep_output(keeper: Keeper, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`call(*args, **kwargs)`, whose products or fused attention are computed once where a piece runs twice."""
    results = keeper.results
    if results is None:
        return call(*args, **kwargs)
    with intercept(_replay(results) if keeper.is_second_run else _record(results)):
        return call(*args, **kwargs)


def _record(results: deque[Any]) -> Callable[..., Any]:
    def handle(overload: Any, args: Any, kwargs: Any) -> Any:
        made = overload(*args, **kwargs)
        if _is_costly(overload):
            results.append([x.detach() if isinstance(x, Tensor) else x for x in _as_tuple(made)])
        return made

    return handle


def _replay(results: deque[Any]) -> Callable[..., Any]:
    def handle(overload: Any, args: Any, kwargs: Any) -> Any:
        if not _is_costly(overload):
            return overload(*args, **kwargs)
        kept = results.popleft()
        return kept[0] if len(kept) == 1 else tuple(kept)

    return handle


def _as_tuple(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else (made,)


def _is_costly(overload: Any) -> bool:
    name = op_name(overload)
    return name in PRODUCTS or name.startswith(ATTENTION)
