"""Money and carbon of a plan: what a step and a job cost, when a job starts best, and what least energy would cost.

Facility energy is PUE x (GPUs and hosts). Every figure here rests on numbers that the user gave, so all are `assumed`,
and each says which flag or file it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from autopar.errors import InputError
from autopar.ir.plan import Plan, Prediction
from autopar.ir.quantity import Quantity
from autopar.ir.solution import Decisions, Objective
from autopar.planner.choose import Candidate, Choice, describe, value_of
from autopar.planner.objective import FLAGS, JOULES_PER_KWH, SECONDS_PER_HOUR, Economy, objective_of
from autopar.planner.request import PlanRequest
from autopar.planner.tariff import Job, extreme_starts, mean_rate
from autopar.units import format_joules, format_seconds

MONEY, GRAMS = "currency", "gCO2e"
MOST_ROUNDS = 3


@dataclass(frozen=True)
class Bill:
    """What some steps cost; None where a price or intensity is not given.

    Attributes:
        gpu: rental or purchase of the GPUs, in the user's currency.
        electricity: of the facility.
        carbon_g: of the facility's electricity and, where given, of making the GPUs.
    """

    gpu: Quantity | None
    electricity: Quantity | None
    carbon_g: Quantity | None

    @property
    def money(self) -> float | None:
        """GPUs and electricity together; None if nothing is priced."""
        known = [quantity.value for quantity in (self.gpu, self.electricity) if quantity is not None]
        return sum(known) if known else None


def bill(
    economy: Economy,
    prediction: Prediction,
    num_gpus: int,
    *,
    steps: int = 1,
    rates: tuple[float | None, float | None] | None = None,
) -> Bill:
    """Money and carbon of `steps` steps; `rates` are price and gCO2e per kWh over the run, else the day's means."""
    price, carbon_g = rates or (economy.mean_price, economy.mean_carbon_g)
    kwh = economy.pue * steps / JOULES_PER_KWH
    gpu_hours = steps * num_gpus / SECONDS_PER_HOUR
    time_s, energy_j = prediction.step_time_s, prediction.energy_j
    emitted = None if carbon_g is None else _scaled(energy_j, kwh * carbon_g, GRAMS)
    made_g = economy.embodied_g_per_gpu_hour
    if made_g is not None:
        emitted = _sum(_scaled(time_s, gpu_hours * made_g, GRAMS), emitted)
    return Bill(
        gpu=None if economy.gpu_rate is None else _scaled(time_s, gpu_hours * economy.gpu_rate, MONEY),
        electricity=None if price is None else _scaled(energy_j, kwh * price, MONEY),
        carbon_g=emitted,
    )


@dataclass(frozen=True)
class Start:
    """A start of a job: hour of the day, what the job then costs, and its mean price and gCO2e per kWh."""

    hour: float
    bill: Bill
    rates: tuple[float | None, float | None]


def starts(economy: Economy, job: Job, kind: str, prediction: Prediction, num_gpus: int) -> tuple[Start, Start]:
    """Best and worst start within the job's window, by money or, for `carbon`, by carbon.

    The other column decides where the tariff holds it alone.
    """
    tariff = economy.tariff
    if tariff is None:
        raise ValueError("a start is better than another only under a tariff")
    columns = (tariff.prices, tariff.carbon_g)
    decisive = next(rates for rates in (columns[::-1] if kind == "carbon" else columns) if rates is not None)
    hours = job.steps * prediction.step_time_s.value / SECONDS_PER_HOUR

    def start(hour: float) -> Start:
        flat = (economy.energy_price, economy.grid_carbon_g)
        price, carbon_g = (
            otherwise if hourly is None else mean_rate(hourly, hour, hours)
            for hourly, otherwise in zip(columns, flat, strict=True)
        )
        rates = (price, carbon_g)
        return Start(hour, bill(economy, prediction, num_gpus, steps=job.steps, rates=rates), rates)

    best, worst = extreme_starts(decisive, job.window, hours)
    return start(best), start(worst)


def settled(request: PlanRequest, choose: Callable[[PlanRequest], Choice]) -> tuple[PlanRequest, Choice]:
    """What is planned, and the request with the objective that it was planned by.

    How long a job lasts decides which hours it pays for, and what they cost decides the plan: the search is repeated at
    the mean rates of the last plan's best start until they stay, at most MOST_ROUNDS times, and the plan whose job is
    worth most at its own best start is taken.
    """
    economy, kind = request.economy, request.objective.kind
    if economy is None or economy.job is None:
        return request, choose(request)
    job = economy.job

    def best_start(choice: Choice) -> Start:
        candidate = choice.candidate
        return starts(economy, job, kind, candidate.prediction, candidate.decisions.num_gpus)[0]

    def objective_at(start: Start) -> Objective:
        price, carbon_g = start.rates
        try:
            return objective_of(kind, economy, (None if price is None else max(price, 0.0), carbon_g))
        except InputError:
            # Nothing costs anything in these hours: the day's mean tells plans apart.
            return request.objective

    start = best_start(choose(replace(request, with_baselines=False)))
    found: list[tuple[float, PlanRequest, Choice]] = []
    for _ in range(MOST_ROUNDS):
        asked = replace(request, objective=objective_at(start))
        choice, before = choose(asked), start
        start = best_start(choice)
        found.append(
            (value_of(objective_at(start), choice.candidate.decisions, choice.candidate.prediction), asked, choice)
        )
        if start.rates == before.rates:
            break
    _, asked, choice = min(found, key=lambda entry: entry[0])
    return asked, choice


def economy_notes(plan: Plan, economy: Economy, rival: Candidate | None = None) -> tuple[str, ...]:
    """Sentences for the plan's reader; `rival` is the plan of least energy."""
    predicted, num_gpus = plan.predicted, plan.decisions.num_gpus
    notes = [f"assumed, as given: {'; '.join(_assumptions(economy))}"]
    notes.append(f"one step: {_words(bill(economy, predicted, num_gpus))}")
    if economy.job is not None:
        best, worst = starts(economy, economy.job, plan.objective.kind, predicted, num_gpus)
        hours = economy.job.steps * predicted.step_time_s.value / SECONDS_PER_HOUR
        notes.append(
            f"{economy.job.steps} steps last {hours:.4g} h; best start {clock(best.hour)}: {_words(best.bill)}; "
            f"worst start {clock(worst.hour)}: {_words(worst.bill)}"
        )
    if rival is not None:
        notes.append(_side_by_side(plan, economy, rival))
    return tuple(notes)


def _side_by_side(plan: Plan, economy: Economy, rival: Candidate) -> str:
    kind = plan.objective.kind
    if rival.decisions == plan.decisions:
        return f"the plan of least energy is the same as that of least {kind}"

    def words(name: str, decisions: Decisions, prediction: Prediction) -> str:
        figures = f"{format_seconds(prediction.step_time_s.value)}, {format_joules(prediction.energy_j.value)}"
        locked = sorted({stage.clock_hz for stage in decisions.stages} - {0.0})
        clocks = f" at {'-'.join(f'{hz / 1e6:.0f}' for hz in locked)} MHz" if locked else ""
        spent = _words(bill(economy, prediction, decisions.num_gpus))
        return f"{name}: {decisions.num_gpus} GPUs, {describe(decisions)}{clocks}: {figures}, {spent}"

    mine = words(f"least {kind}", plan.decisions, plan.predicted)
    return f"{mine}; {words('least energy', rival.decisions, rival.prediction)}"


def clock(hour: float) -> str:
    """`02:30`, to the minute."""
    minutes = round(hour * 60) % (24 * 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _assumptions(economy: Economy) -> Iterator[str]:
    """Every number with its source."""
    yield f"PUE {economy.pue:g} ({'--pue' if economy.pue != 1 else 'none given'})"
    if economy.gpu_hour_price is not None:
        yield f"{economy.gpu_hour_price:g} per GPU-hour ({FLAGS['gpu_hour_price']})"
    if economy.gpu_price is not None:
        use = f"{economy.lifetime_years:g} years at {economy.utilisation:.0%} use"
        yield f"{economy.gpu_price:g} per GPU over {use}, {economy.gpu_rate:.4g} per GPU-hour ({FLAGS['gpu_price']})"
    if economy.mean_price is not None:
        yield f"{economy.mean_price:.4g} per kWh ({_source(economy, 'energy_price')})"
    if economy.mean_carbon_g is not None:
        yield f"{economy.mean_carbon_g:.4g} gCO2e per kWh ({_source(economy, 'grid_carbon_g')})"
    if economy.embodied_g_per_gpu_hour is not None:
        yield f"{economy.embodied_g_per_gpu_hour:g} gCO2e per GPU-hour ({FLAGS['embodied_g_per_gpu_hour']})"


def _source(economy: Economy, name: str) -> str:
    if getattr(economy, name) is not None or economy.tariff is None:
        return FLAGS[name]
    return f"{economy.tariff.source}, mean of the day"


def _words(spent: Bill) -> str:
    """`cost 0.0012 (GPUs 0.001, electricity 0.0002), 0.3 g CO2e`."""
    parts: list[str] = []
    if spent.money is not None:
        named = (("GPUs", spent.gpu), ("electricity", spent.electricity))
        split = ", ".join(f"{name} {quantity.value:.4g}" for name, quantity in named if quantity is not None)
        parts.append(f"cost {spent.money:.4g} ({split})")
    if spent.carbon_g is not None:
        grams = spent.carbon_g.value
        parts.append(f"{grams / 1000:.4g} kg CO2e" if grams >= 1000 else f"{grams:.4g} g CO2e")
    return ", ".join(parts)


def _scaled(quantity: Quantity, factor: float, unit: str) -> Quantity:
    """A figure times a number of the user's, which may be negative (a tariff's price)."""
    low, high = sorted((quantity.low * factor, quantity.high * factor))
    return Quantity(quantity.value * factor, unit, "assumed", low, high)


def _sum(first: Quantity, second: Quantity | None) -> Quantity:
    if second is None:
        return first
    return replace(first, value=first.value + second.value, low=first.low + second.low, high=first.high + second.high)
