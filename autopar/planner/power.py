"""Measuring what a GPU draws, for `autopar profile`: which board it is, at which clocks, and what may be set.

Clocks are set only if asked for, by the same means as in a run: a guardian restores them whatever happens.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autopar.clocks.hold import Wanted, hold
from autopar.cost.hardware import load_cluster
from autopar.errors import InputError
from autopar.meters import (
    EnergyMeter,
    NvmlMeter,
    Repeated,
    WindowRules,
    find_boards,
    power_at_rest,
    visible_gpus,
)
from autopar.nvml import Board, Nvml, NvmlError, open_nvml
from autopar.planner.detect import kebab_name
from autopar.profiler.power import USUAL_RIDGE, PowerBench, PowerProfile, measure_power

OPS = WindowRules(trials=1, warm_up_s=0.2)
CURVE = WindowRules(trials=2)
QUICK_OPS = WindowRules(window_s=1.0, trials=1, warm_up_s=0.1)
QUICK_CURVE = WindowRules(window_s=2.0, trials=1, warm_up_s=0.5, cool_down_s=0.5)
"""With `--quick`: windows so short read low, and their readings say so."""

MakeWork = Callable[[EnergyMeter, WindowRules], tuple[Callable[[], Repeated], Callable[[], Repeated]]]
"""Makes products and streams on the GPU, and with them its context."""


@dataclass(frozen=True)
class PowerRequest:
    """How to measure power.

    Attributes:
        name: of the device in `costmodels/`.
        rules: of windows.
        lock_clocks: whether clocks may be set.
    """

    name: str
    rules: WindowRules = CURVE
    lock_clocks: bool = False


def board_of(nvml: Nvml, device: str, environment: Mapping[str, str] = os.environ) -> Board:
    """The board of `cuda:N`, as CUDA counts. Raises InputError if there is none."""
    kind, _, number = device.partition(":")
    index = int(number or 0) if (number or "0").isdecimal() else -1
    wanted = visible_gpus(environment, index + 1) if kind == "cuda" and index >= 0 else []
    try:
        if len(wanted) == index + 1 and wanted:
            return find_boards(nvml, wanted[index:])[0]
        found = nvml.boards()
    except NvmlError as error:
        raise InputError(f"no device {device!r} here: {error}") from error
    known = ", ".join(["cpu", *(f"cuda:{i}" for i in range(len(visible_gpus(environment, len(found)))))])
    raise InputError(f"no device {device!r} here; this machine has {known}")


def device_name(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """Name in `costmodels/` of `cuda:N`. Raises InputError if it is not there or has no cost model."""
    try:
        with open_nvml() as nvml:
            product = board_of(nvml, device, environment).name
    except NvmlError as error:
        raise InputError(f"no device {device!r} here; this machine has cpu ({error})") from error
    name = kebab_name(product)
    if name is None:
        raise InputError(f"{product} has no cost model yet (see 'autopar gpus'), so no plan could use it")
    return name


def measure_gpu(
    board: Board, meter: NvmlMeter, make_work: MakeWork, request: PowerRequest, say: Callable[[str], None]
) -> tuple[PowerProfile, float]:
    """What the board draws, and its blocked power (the device file's if it is not measured).

    This process must have no context on the GPU yet: idle power is measured first.
    """
    say("power without a context")
    idle_w, idle_reason = power_at_rest(meter, request.rules)
    product, stream = make_work(meter, request.rules)
    say("power with a context and nothing to do")
    blocked_w, blocked_reason = power_at_rest(meter, request.rules)
    notes: list[str] = []

    @contextlib.contextmanager
    def at_clock(clock_hz: float) -> Iterator[float | None]:
        with hold([Wanted(board.uuid, clock_hz / 1e6)]) as held:
            if not held.clocks_mhz:
                notes.extend((*held.notes, *held.commands))
                yield None
                return
            say(f"power at {held.clocks_mhz[board.index]:g} MHz")
            yield held.clocks_mhz[board.index] * 1e6

    spec = load_cluster(request.name, 1).spec
    try:
        bench = PowerBench(
            idle_w, blocked_w, product, stream, at_clock, lambda: 1e6 * board.clock_mhz(),
            _clocks_hz(board) if request.lock_clocks else (), board.power_limit_w(), f"{board.name} {board.uuid}",
        )  # fmt: skip
        found = measure_power(bench, spec.clock_control.ridge_share if spec.clock_control else USUAL_RIDGE)
    except NvmlError as error:
        found = PowerProfile((), None, None, (f"power is not measured: {error}",))
    if request.rules.window_s < OPS.window_s:
        notes.append(f"windows of energy and power are short (ops {QUICK_OPS.window_s:g} s): within 10 % at best")
    if not request.lock_clocks:
        notes.append("clocks are left alone: --lock-clocks measures power by clock where it may set them")
    for what, watts, reason in (("idle", idle_w, idle_reason), ("blocked", blocked_w, blocked_reason)):
        if watts is None or reason:
            notes.append(f"{what} power: {reason}")
    noted = PowerProfile(found.numbers, found.time, found.power, (*found.notes, *notes))
    return noted, spec.blocked_w if blocked_w is None else blocked_w


def _clocks_hz(board: Board) -> tuple[float, ...]:
    try:
        return tuple(1e6 * mhz for mhz in board.supported_clocks_mhz())
    except NvmlError:
        return ()
