"""Options that hold GPUs at a plan's clocks and power limits while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from autopar.planner.settings import BoardSettings


def board_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options and hands them on as `boards`."""

    @click.option(
        "--lock-clocks", is_flag=True, help="Lock each GPU to the clock of its stage; restored whatever happens."
    )
    @click.option(
        "--clock-schedule",
        metavar="FILE",
        help="Lock each GPU to the highest clock of its instructions in a file of 'autopar clocks --out'.",
    )
    @click.option("--set-power-limit", is_flag=True, help="Set the power limit that the plan was made with, likewise.")
    @functools.wraps(command)
    def wrapped(*args: Any, lock_clocks: bool, clock_schedule: str | None, set_power_limit: bool, **others: Any) -> Any:
        return command(*args, boards=BoardSettings(lock_clocks, set_power_limit, clock_schedule), **others)

    return wrapped
