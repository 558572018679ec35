"""ClockSwitch: asks for the clock of each instruction of a rank just before the instruction begins.

A forward begins when its stage's module is called, a backward when the first gradient of what that call returned is
there, the update when the optimizer is called; the update runs at the rank's highest clock. The host issues work ahead
of a GPU, so before a change it waits until the GPU has done what it was given. A thread of its own makes the calls,
which take milliseconds: the instruction runs on meanwhile, and of several wishes only the newest is granted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopar.ir.timeline import BACKWARD, FORWARD

Clocks = Mapping[tuple[int, str, int], float]
"""MHz by chunk of this rank, `F` or `B`, and microbatch."""
SetClock = Callable[[float], bool]
"""Locks this rank's clock, in MHz; whether it was granted."""


class ClockSwitch:
    """See the module docstring. Use it as a context around the steps of a run.

    Attributes:
        num_changes: clocks that were granted.
        is_refused: a call was not granted; none was made after it.
    """

    def __init__(
        self,
        runners: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        clocks: Clocks,
        set_clock: SetClock,
        device: str = "cpu",
    ) -> None:
        """Nothing is hooked yet.

        Args:
            runners: stages of this rank in the order of its chunks; each is called once per microbatch, in order.
            clocks: of every forward and backward of a step.
        """
        self.num_changes, self.is_refused = 0, False
        self._runners, self._optimizer = tuple(runners), optimizer
        self._clocks, self._set_clock, self._device = clocks, set_clock, device
        self._count = 1 + max(microbatch for _, _, microbatch in clocks)
        self._calls = [0] * len(self._runners)
        self._wish: float | None = None
        self._asked = 0.0
        self._is_over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="autopar-clocks", daemon=True)
        self._handles: list[Any] = []

    def __enter__(self) -> ClockSwitch:
        for chunk, runner in enumerate(self._runners):
            self._handles.append(runner.register_forward_pre_hook(self._before_forward(chunk)))
            self._handles.append(runner.register_forward_hook(self._after_forward(chunk)))
        self._handles.append(self._optimizer.register_step_pre_hook(lambda *_: self._ask(max(self._clocks.values()))))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends when the last wish is granted."""
        for handle in self._handles:
            handle.remove()
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def _before_forward(self, chunk: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any) -> None:
            self._begin(chunk, FORWARD, self._calls[chunk] % self._count)

        return hook

    def _after_forward(self, chunk: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            microbatch = self._calls[chunk] % self._count
            self._calls[chunk] += 1
            begun: list[bool] = []

            def backward(_gradient: Tensor) -> None:
                if not begun:
                    begun.append(True)
                    self._begin(chunk, BACKWARD, microbatch)

            for tensor in (output,) if isinstance(output, Tensor) else output:
                if tensor.requires_grad:
                    tensor.register_hook(backward)  # type: ignore[no-untyped-call]

        return hook

    def _begin(self, chunk: int, work: str, microbatch: int) -> None:
        self._ask(self._clocks[chunk, work, microbatch])

    def _ask(self, mhz: float) -> None:
        if mhz == self._asked or self.is_refused:
            return
        if self._device.startswith("cuda"):
            torch.cuda.current_stream(self._device).synchronize()
        with self._changed:
            self._asked = self._wish = mhz
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while self._wish is None and not self._is_over:
                    self._changed.wait()
                wish, self._wish = self._wish, None
            if wish is None:
                return
            if not self._set_clock(wish):
                self.is_refused = True
                return
            self.num_changes += 1
