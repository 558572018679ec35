"""`autopar replan`: another plan once a deadline, a price, a power cap or the number of GPUs has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import LIMIT_OPTIONS, json_option, limits_of, with_options
from autopar.cli.pins import Pinned, parse_pins
from autopar.errors import InputError
from autopar.ir.plan import Plan
from autopar.ir.serialize import check_writable, load_plan, save_plan
from autopar.ir.solution import Pins
from autopar.planner.objective import Economy
from autopar.planner.replan import KINDS, Change, Means
from autopar.planner.replan import replan as replan_plan
from autopar.planner.request import CLOCKS
from autopar.report.replan import replan_json, replan_report
from autopar.report.text import closing_hints, wrapped

CHANGES = (
    *LIMIT_OPTIONS,
    click.option("--gpus", type=int, metavar="N", help="Ceiling on the number of GPUs from now on."),
    click.option("--price", type=float, metavar="PRICE", help="Per kWh from now on; the objective becomes cost."),
    click.option("--gpu-hour-price", type=float, metavar="PRICE", help="Per GPU and hour from now on, for cost."),
    click.option("--grid-carbon", type=float, metavar="GRAMS", help="gCO2e per kWh; the objective becomes carbon."),
    click.option("--pue", type=float, metavar="FACTOR", help="Energy of the facility over its machines'."),
    click.option(
        "--objective", type=click.Choice(KINDS), help="Default: as made; of a time plan under a deadline, energy."
    ),
)
MEANS = (
    click.option("--store", metavar="DIR", help="Directory of 'autopar frontier --out-dir'; default: the plan's own."),
    click.option(
        "--compute/--no-compute", default=None, help="Search in any case, or never; default: where no stored plan fits."
    ),
    click.option(
        "--pin", "pin_text", metavar="KEY=VALUE,...", help="Fix parts of the plan, as for planning; searches."
    ),
    click.option("--unpin", is_flag=True, help="Drop the pins that the plan was made under; else they are kept."),
    click.option("--clocks", type=click.Choice(CLOCKS), help="Whether the plan may lock clocks; default: as made."),
    click.option("--profile", metavar="FILE", help="Measured rows, as for planning."),
)


@click.command()
@click.argument("plan_file")
@with_options(*CHANGES, *MEANS)
@click.option("--out", metavar="FILE", help="Write the new plan there.")
@json_option
def replan(plan_file: str, *, out: str | None, as_json: bool, **options: Any) -> None:
    """Pick another plan for the model of PLAN_FILE after something has changed, or compute one."""
    old = load_plan(plan_file)
    change, means = _change(options), _means(options, old)
    if out is not None:
        check_writable(out)
    with progress_line(as_json) as progress:
        found = replan_plan(old, plan_file, change, means, progress)
    if out is not None:
        save_plan(found.plan, out)
    told = (found.how, (found.num_stored, found.num_fitting), found.sources)
    if as_json:
        print_json({**replan_json(old, found.plan, *told), "remarks": list(found.remarks)})
        return
    remarks = [line for remark in found.remarks for line in wrapped("Note", remark)]
    hints = closing_hints(out) if out is not None else ["", *wrapped("Next", "--out FILE writes this plan")]
    click.echo("\n".join([replan_report(old, found.plan, *told), *remarks, *hints]))


def _change(options: dict[str, Any]) -> Change:
    num_gpus, pue = options["gpus"], options["pue"]
    if num_gpus is not None and num_gpus < 1:
        raise InputError(f"--gpus must be at least 1, got {num_gpus}")
    priced = Economy(
        pue=1.0 if pue is None else pue,
        energy_price=options["price"],
        gpu_hour_price=options["gpu_hour_price"],
        grid_carbon_g=options["grid_carbon"],
    )
    return Change(
        limits=limits_of(options),
        num_gpus=num_gpus,
        energy_price=priced.energy_price,
        gpu_hour_price=priced.gpu_hour_price,
        grid_carbon_g=priced.grid_carbon_g,
        pue=pue,
        kind=options["objective"],
    )


def _means(options: dict[str, Any], plan: Plan) -> Means:
    pins = Pins() if options["unpin"] else None
    if options["unpin"] and options["pin_text"]:
        raise InputError("--pin replaces the plan's pins, --unpin drops them: give one of them")
    if options["pin_text"]:
        pinned = parse_pins(options["pin_text"], plan.model.batch_size)
        if pinned != Pinned(pinned.pins, plan.model.batch_size):
            raise InputError("--pin: the model, its batch and its software stay those of the plan")
        pins = pinned.pins
        if options["compute"] is False:
            raise InputError("--pin needs a search: leave out --no-compute")
    store = None if options["store"] is None else Path(options["store"])
    return Means(store, options["compute"], pins, options["clocks"], options["profile"])
