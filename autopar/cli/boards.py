"""Options that hold GPUs at a plan's clocks and power limits while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from autopar.cli.quantities import parse_seconds
from autopar.errors import InputError
from autopar.planner.settings import BoardSettings


def board_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options and hands them on as `boards`."""

    @click.option(
        "--lock-clocks", is_flag=True, help="Lock each GPU to the clock of its stage; restored whatever happens."
    )
    @click.option(
        "--clock-schedule",
        metavar="FILE",
        help="Follow a file of 'autopar clocks --out': a clock per instruction where those last long enough, else the "
        "highest per GPU.",
    )
    @click.option(
        "--clock-switch-time",
        metavar="TIME",
        help="How long a GPU takes to reach another clock; instructions of 10 times that get their own. Default: 20ms.",
    )
    @click.option("--set-power-limit", is_flag=True, help="Set the power limit that the plan was made with, likewise.")
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        lock_clocks: bool,
        clock_schedule: str | None,
        clock_switch_time: str | None,
        set_power_limit: bool,
        **others: Any,
    ) -> Any:
        boards = BoardSettings(lock_clocks, set_power_limit, clock_schedule)
        if clock_switch_time is not None:
            if clock_schedule is None:
                raise InputError("--clock-switch-time is for --clock-schedule: give its file, too")
            boards = replace(boards, switch_s=_seconds(clock_switch_time))
        return command(*args, boards=boards, **others)

    return wrapped


def _seconds(text: str) -> float:
    try:
        return parse_seconds(text)
    except InputError as error:
        raise InputError(f"--clock-switch-time: {error}") from error
