"""The command group, and `invoke`, which turns every deliberate error into one message and an exit code.

0 done, 1 our fault, 2 the user's input, 3 infeasible, 4 verification failed, 130 interrupted, 143 terminated. An error
that is not deliberate keeps its traceback: it is a bug, and the traceback is what we need to fix it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from autopar.cli.checkpoint import checkpoint
from autopar.cli.clocks import clocks
from autopar.cli.console import error_details, exit_code, report_error
from autopar.cli.diff import diff
from autopar.cli.estimate import estimate
from autopar.cli.execute import run, verify
from autopar.cli.explain import explain
from autopar.cli.export import export
from autopar.cli.frontier import frontier
from autopar.cli.gpus import gpus
from autopar.cli.meter import meter
from autopar.cli.plan import plan
from autopar.cli.profile import profile
from autopar.cli.replan import replan
from autopar.cli.study import study
from autopar.cli.sweep import sweep
from autopar.cli.unlock import unlock
from autopar.cli.validate import validate
from autopar.errors import AutoparError, NetworkError
from autopar.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="autopar")
def autopar() -> None:
    """Plan, price and run the parallelisation of a PyTorch model, by time and by energy."""


for _command in (
    plan,
    estimate,
    frontier,
    sweep,
    study,
    clocks,
    replan,
    validate,
    run,
    checkpoint,
    verify,
    unlock,
    meter,
    export,
    explain,
    diff,
    gpus,
    profile,
):
    autopar.add_command(_command)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    as_json = "--json" in arguments
    try:
        result = autopar.main(list(arguments), prog_name="autopar", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        hint = _usage_hint(error)
        return report_error(error.format_message() + hint, "usage", 2, as_json, {})
    except NetworkError as error:
        if error.is_told:  # and the launcher may start this again, whose answer is the one for stdout
            return error.exit_code
        return report_error(str(error), error.kind, error.exit_code, as_json, {})
    except AutoparError as error:
        return report_error(str(error), error.kind, error.exit_code, as_json, error_details(error))
    except click.Abort as abort:
        # click's own name for a KeyboardInterrupt, which stays as its cause.
        return report_error("interrupted", "interrupted", exit_code(abort.__cause__), as_json, {})
    except BrokenPipeError:
        # The reader has left: nobody to tell, and Python must not try to flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0


def _usage_hint(error: click.ClickException) -> str:
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return ""
    return f"\n  see '{error.ctx.command_path} --help'"
