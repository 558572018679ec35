"""Money and carbon: formulas against hand arithmetic, objectives against the plans that they must equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.ir.plan import Plan, Prediction
from autopar.ir.quantity import Quantity
from autopar.ir.solution import Objective
from autopar.planner.economy import bill, clock, economy_notes, starts
from autopar.planner.objective import Economy, objective_of
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from autopar.planner.tariff import HOURS, Job, Tariff, Window
from tests.planner.plans import tiny_plan

MODEL = Path(__file__).resolve().parents[2] / "examples" / "mlp.py"
NIGHT = tuple(0.1 if hour < 6 else 0.3 for hour in range(HOURS))
SUN = tuple(400.0 - 300.0 * (10 <= hour < 16) for hour in range(HOURS))


def running(time_s: float, watts: float) -> Prediction:
    """A step of the tiny plan with other figures, exactly known."""
    energy_j = time_s * watts
    figures = {"step_time_s": (time_s, "s"), "energy_j": (energy_j, "J"), "average_power_w": (watts, "W")}
    exact = {name: Quantity(value, unit, "modelled", value, value) for name, (value, unit) in figures.items()}
    return replace(tiny_plan().predicted, **exact)


def made(objective: Objective, economy: Economy | None = None) -> Plan:
    """A plan of a wide multi-layer perceptron."""
    options = {"hidden": "4096", "batch": "2048"}
    request = PlanRequest(4, "h100-sxm-80gb", objective=objective, economy=economy)
    return plan_model(str(MODEL), options, request)


def test_a_published_total() -> None:
    # BLOOM-176B: 1,082,990 GPU-hours at 400 W and 57 g/kWh are 433,196 kWh and 24.7 t.
    spent = bill(Economy(grid_carbon_g=57), running(3600.0, 400.0), 1, steps=1_082_990)
    assert spent.carbon_g is not None
    assert spent.carbon_g.value == pytest.approx(433_196 * 57)
    assert (spent.carbon_g.label, spent.carbon_g.unit, spent.gpu, spent.money) == ("assumed", "gCO2e", None, None)


def test_a_bought_gpu_costs_its_price_over_the_hours_of_use() -> None:
    bought = Economy(gpu_price=30_000, energy_price=0.11, pue=1.2)
    assert bought.gpu_rate == pytest.approx(1.0702, abs=1e-4)
    spent = bill(bought, running(3600.0, 700.0), 1)
    assert spent.gpu is not None
    assert spent.electricity is not None
    assert spent.gpu.value == pytest.approx(1.0702, abs=1e-4)
    assert spent.electricity.value == pytest.approx(0.7 * 1.2 * 0.11)
    assert {spent.gpu.label, spent.electricity.label} == {"assumed"}
    rented = replace(bought, gpu_price=None, gpu_hour_price=bought.gpu_rate)
    assert objective_of("cost", bought) == objective_of("cost", rented)


def test_the_objective_is_the_bill_of_a_step() -> None:
    economy = Economy(1.3, 0.2, 350.0, gpu_hour_price=2.0, embodied_g_per_gpu_hour=30.0)
    prediction = running(0.7, 3000.0)
    spent = bill(economy, prediction, 4)
    for kind, figure in (("cost", spent.money), ("carbon", spent.carbon_g.value if spent.carbon_g else None)):
        value = objective_of(kind, economy).value(0.7, prediction.energy_j.value, 4)
        assert value == pytest.approx(figure)


def test_a_tariff_counts_by_the_mean_of_the_day() -> None:
    economy = Economy(gpu_hour_price=0, tariff=Tariff(NIGHT, SUN, "t.csv"))
    flat = Economy(gpu_hour_price=0, energy_price=0.25, grid_carbon_g=325.0)
    for kind in ("cost", "carbon"):
        assert objective_of(kind, economy).energy_weight == pytest.approx(objective_of(kind, flat).energy_weight)


@pytest.mark.parametrize("kind", ["cost", "carbon"])
def test_best_and_worst_start_by_brute_force(kind: str) -> None:
    window = Window(7.0, 20.0)
    economy = Economy(1.2, gpu_hour_price=1.0, tariff=Tariff(NIGHT, SUN, "t.csv"), job=Job(1000, window))
    prediction = running(9.0, 2000.0)  # 2.5 h at 2.4 kW of the facility
    rates = {"cost": NIGHT, "carbon": SUN}[kind]

    def slow(start_min: int) -> float:
        return sum(2.4 / 60 * rates[(start_min + m) // 60 % HOURS] for m in range(150))

    assert economy.job is not None
    best, worst = starts(economy, economy.job, kind, prediction, 4)
    grid = [slow(minute) for minute in range(7 * 60, 27 * 60 + 1)]
    for start, extreme in ((best, min(grid)), (worst, max(grid))):
        figure = start.bill.electricity if kind == "cost" else start.bill.carbon_g
        assert figure is not None
        assert figure.value == pytest.approx(extreme)
        assert slow(round(start.hour * 60)) == pytest.approx(extreme)
        assert start.bill.gpu is not None
        assert start.bill.gpu.value == pytest.approx(4 * 2.5)


def test_notes_say_where_each_number_comes_from() -> None:
    economy = Economy(1.2, gpu_price=30_000, tariff=Tariff(NIGHT, SUN, "t.csv"), job=Job(1000))
    own = replace(tiny_plan(), objective=objective_of("cost", economy))
    text = "\n".join(economy_notes(own, economy))
    for words in ("assumed", "PUE 1.2 (--pue)", "(--gpu-price)", "t.csv, mean of the day", "best start", "worst start"):
        assert words in text


def test_clocks_are_times_of_day() -> None:
    assert [clock(hour) for hour in (0.0, 2.5, 23.999)] == ["00:00", "02:30", "00:00"]


def test_carbon_alone_is_energy() -> None:
    clean = Economy(grid_carbon_g=400.0, pue=1.5)
    energy, carbon = made(Objective("energy")), made(objective_of("carbon", clean), clean)
    assert carbon.decisions == energy.decisions
    assert carbon.predicted == energy.predicted
    assert carbon.objective == Objective("carbon", energy_weight=1.5 * 400 / 3.6e6, pue=1.5)
    assert any("least energy is the same" in note for note in carbon.notes)
    assert carbon.solver.objective == pytest.approx(energy.solver.objective * 1.5 * 400 / 3.6e6)


def test_dear_gpus_move_the_cost_optimum_away_from_the_energy_optimum() -> None:
    economy = Economy(gpu_price=30_000, energy_price=0.11)
    dear, energy = made(objective_of("cost", economy), economy), made(Objective("energy"))
    told = next(note for note in dear.notes if "least energy" in note)
    differs = dear.decisions != energy.decisions
    assert differs == ("least cost:" in told)
    value = dear.objective.value
    costs = [value(p.predicted.step_time_s.value, p.predicted.energy_j.value, p.decisions.num_gpus)
             for p in (dear, energy)]  # fmt: skip
    assert costs[0] <= costs[1] * (1 + 1e-9)
    assert energy.predicted.energy_j.value <= dear.predicted.energy_j.value * (1 + 1e-9)


BAD = {
    "PUE below 1": ({"pue": 0.9}, "--pue"),
    "negative price": ({"energy_price": -0.1}, "--energy-price"),
    "NaN": ({"grid_carbon_g": float("nan")}, "--grid-carbon"),
    "rented and bought": ({"gpu_price": 1.0, "gpu_hour_price": 1.0}, "give one of them"),
    "no use": ({"gpu_price": 1.0, "utilisation": 0.0}, "--utilisation"),
    "two prices": ({"energy_price": 0.1, "tariff": Tariff(NIGHT, None, "t")}, "--energy-price"),
    "a job without tariff": ({"job": Job(5)}, "--tariff"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_refused(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(InputError, match=message):
        Economy(**fields)


@pytest.mark.parametrize(
    ("kind", "economy", "message"),
    [
        ("cost", Economy(energy_price=1.0), "--gpu-hour-price"),
        ("cost", Economy(gpu_hour_price=1.0), "--energy-price"),
        ("cost", Economy(gpu_hour_price=0.0, energy_price=0.0), "above 0"),
        ("carbon", Economy(energy_price=1.0), "--grid-carbon"),
        ("carbon", Economy(tariff=Tariff(NIGHT, None, "t")), "--tariff"),
        ("carbon", Economy(grid_carbon_g=0.0), "above 0"),
    ],
)
def test_an_objective_needs_its_numbers(kind: str, economy: Economy, message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective_of(kind, economy)


def test_a_job_is_planned_at_the_rates_of_its_best_start() -> None:
    tariff = Tariff(tuple(0.01 if hour < 3 else 5.0 for hour in range(HOURS)), None, "t.csv")
    economy = Economy(gpu_hour_price=1.0, tariff=tariff, job=Job(1000))
    short = made(objective_of("cost", economy), economy)
    assert short.objective == objective_of("cost", economy, (0.01, None))
    assert short.decisions == made(objective_of("cost", economy, (0.01, None))).decisions
    long = replace(economy, job=Job(10**9))
    assert long.job is not None
    days = made(objective_of("cost", long), long)
    assert days.objective.energy_weight == pytest.approx(objective_of("cost", long).energy_weight, rel=1e-2)
    best, _ = starts(long, long.job, "cost", days.predicted, days.decisions.num_gpus)
    time_s, energy_j = days.predicted.step_time_s.value, days.predicted.energy_j.value
    expected = 10**9 * days.objective.value(time_s, energy_j, days.decisions.num_gpus)
    assert best.bill.money == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rental", [0.0, 1.0])
def test_hours_with_a_negative_price_count_as_free(rental: float) -> None:
    tariff = Tariff(tuple(-0.1 if hour < 3 else 5.0 for hour in range(HOURS)), None, "t.csv")
    economy = Economy(gpu_hour_price=rental, tariff=tariff, job=Job(10))
    found = made(objective_of("cost", economy), economy)
    free = replace(found.objective, energy_weight=0.0)
    assert found.objective == (free if rental else objective_of("cost", economy))
    assert any("best start 00:00" in note for note in found.notes)
