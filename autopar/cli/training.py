"""Options of `autopar run` that say how long to train, on what, and what is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from autopar.ir.run import RunSettings
from autopar.planner.recover import Policy

OPTIONS = (
    click.option("--steps", default=10, show_default=True, metavar="N", help="Optimizer steps, in all."),
    click.option(
        "--clip-norm", type=float, metavar="X", help="Scale gradients so that their norm over all devices is at most X."
    ),
    click.option(
        "--checkpoint",
        "checkpoints",
        default="",
        metavar="DIR",
        help="Keep checkpoints there, and go on from the newest; a failed worker then restarts the run.",
    ),
    click.option(
        "--checkpoint-every", "every", default=0, metavar="N", help="Steps between checkpoints; default: end."
    ),
    click.option("--keep", default=3, show_default=True, metavar="N", help="How many checkpoints stay."),
    click.option("--async-checkpoints", "is_async", is_flag=True, help="Write checkpoints while training goes on."),
    click.option("--data-seed", default=0, show_default=True, metavar="N", help="Of the order of samples."),
    click.option(
        "--data-workers", type=int, metavar="N", help="Loader processes per rank; default: as dataset() says."
    ),
    click.option(
        "--max-failures",
        default=4,
        show_default=True,
        metavar="N",
        help="In a row without a new checkpoint; one more ends the run. 0: never restart.",
    ),
    click.option(
        "--compile", "compile", flag_value="inductor", default="", help="Compile the stages with torch.compile."
    ),
    click.option(
        "--offload-dir",
        default="",
        metavar="DIR",
        help="Of the file (nameless, gone at the end) of what the plan offloads to disk.  [default: temporary files]",
    ),
    click.option("--adapt", is_flag=True, help="Go on without a device that makes the others wait, if that is faster."),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options and hands them on as `training` and `policy`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **given: Any) -> Any:
        own = {name: given.pop(name) for name in RunSettings.__dataclass_fields__}
        policy = Policy(max_failures=given.pop("max_failures"))
        return command(*args, training=RunSettings(**own), policy=policy, **given)

    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped
