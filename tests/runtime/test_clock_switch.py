"""Clocks asked for between the instructions of a rank: which, when, and what follows a refusal."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from autopar.runtime.clock_switch import ClockSwitch

CLOCKS = {
    (0, "F", 0): 1000.0, (0, "B", 0): 900.0, (0, "F", 1): 1000.0, (0, "B", 1): 800.0,
    (1, "F", 0): 700.0, (1, "B", 0): 600.0, (1, "F", 1): 500.0, (1, "B", 1): 400.0,
}  # fmt: skip


class Stage(nn.Module):
    """Two outputs, as of a stage that sends two tensors on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.inner(x), (2 * x).detach(), x.exp()


class Board:
    """Grants so many clocks; a step waits until its wishes are served, as a GPU's instructions take long."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.log: list[float] = []
        self.served = threading.Event()

    def set_clock(self, mhz: float) -> bool:
        if len(self.log) == self.most:
            self.served.set()
            return False
        self.log.append(mhz)
        self.served.set()
        return True


def steps(board: Board, count: int, clocks: dict[tuple[int, str, int], float] | None = None) -> ClockSwitch:
    """1F1B of two microbatches on both chunks, `count` times."""
    torch.manual_seed(0)
    stages = [Stage(), Stage()]
    parameters = [p for stage in stages for p in stage.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    switch = ClockSwitch(stages, optimizer, clocks or CLOCKS, board.set_clock)

    def settled() -> None:
        # Every wish is served before the next instruction begins.
        while switch._wish is not None or (board.log or [0.0])[-1] != switch._asked:
            if switch.is_refused:
                return
            board.served.wait(0.01)
            board.served.clear()

    with switch:
        for _ in range(count):
            for microbatch in range(2):
                for stage in stages:
                    outputs = stage(torch.ones(2, 3, requires_grad=True) * (1 + microbatch))
                    settled()
                    (outputs[0].sum() + outputs[2].sum()).backward()
                    settled()
            optimizer.step()
            settled()
            optimizer.zero_grad()
    return switch


def test_every_instruction_gets_its_clock_in_order_and_the_update_the_highest() -> None:
    board = Board()
    switch = steps(board, 2)
    once = [1000.0, 900.0, 700.0, 600.0, 1000.0, 800.0, 500.0, 400.0, 1000.0]
    assert board.log == [*once, *once[1:]]  # the update's clock is that of the next step's first forward
    assert switch.num_changes == len(board.log)
    assert not switch.is_refused


def test_equal_clocks_are_asked_for_once() -> None:
    board = Board()
    assert steps(board, 3, dict.fromkeys(CLOCKS, 900.0)).num_changes == 1
    assert board.log == [900.0]


def test_nothing_is_asked_for_after_a_refusal_and_the_run_goes_on() -> None:
    board = Board(most=3)
    switch = steps(board, 2)
    assert board.log == [1000.0, 900.0, 700.0]
    assert switch.is_refused
    assert switch.num_changes == 3


def test_no_hook_is_left_behind() -> None:
    stages, optimizer = [Stage()], torch.optim.SGD(Stage().parameters(), lr=0.1)
    board = Board()
    with ClockSwitch(stages, optimizer, {k: v for k, v in CLOCKS.items() if k[0] == 0}, board.set_clock):
        pass
    stages[0](torch.ones(1, 3, requires_grad=True))[0].sum().backward()
    optimizer.step()
    assert board.log == []
