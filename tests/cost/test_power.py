"""Power limits, clocks and energy: what must hold on any device, and published joules, seconds and watts."""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.device import DeviceSpec
from autopar.cost.hardware import Cluster, list_gpus, load_cluster, with_power_limit
from autopar.cost.power import (
    clock_power_factor,
    dynamic_limit_w,
    kernel_energy_j,
    program_under_limit,
    rated_dynamic_w,
    speed_within,
    stage_w,
)
from autopar.cost.predict import predict
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.mesh import stage_mesh
from autopar.ir.plan import Prediction
from autopar.ir.solution import Decisions
from autopar.planner.request import PlanRequest, choose_target
from autopar.search.clocks import ClockOption, ClockProblem, frontier, pipeline_graph
from tests.cost.decide import decide
from tests.cost.devices import plain_cluster
from tests.toy_graphs import residual_graph

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "energy"
NEED_DATA = pytest.mark.skipif(not DATA.is_dir(), reason=f"measured energy tables are not here: {DATA}")
GRAPH = residual_graph(layers=4)
LIMITED = [spec for spec in list_gpus() if spec.kind == "gpu"]


def curved_cluster(**changes: float) -> Cluster:
    """100 W above blocked, all of which large GEMMs draw; clocks go down to a third."""
    control = load_cluster("a100-pcie-80gb", 1).spec.clock_control
    return plain_cluster(clock_control=control, sustained_share=0.84, gemm_share=1.0, **changes)


def whole_plan(tables: CostTables, cuts: tuple[int, ...] = (2,)) -> Decisions:
    table = tables.table(stage_mesh(2), 2)
    assert table is not None
    return decide(table, lambda node: 0, cuts)


def predicted(cluster: Cluster, cuts: tuple[int, ...] = (2,)) -> Prediction:
    tables = CostTables(GRAPH, cluster)
    return predict(tables, whole_plan(tables, cuts))


def limits_of(spec: DeviceSpec) -> st.SearchStrategy[float]:
    return st.floats(spec.blocked_w * 1.02 + 1, spec.limit_w)


@pytest.mark.parametrize("spec", LIMITED, ids=lambda spec: spec.name)
def test_energy_is_never_negative_at_any_clock(spec: DeviceSpec) -> None:
    cluster = Cluster(spec, 1, 1, 1)
    for at in (spec, *cluster.slower_specs(), *cluster.limiting_specs()):
        for kind in ("gemm", "convolution", "attention", "other"):
            assert kernel_energy_j(at, kind, "float16", np.array([1e9]), np.array([0.0]))[0] > 0
        assert spec.blocked_w < stage_w(at) <= spec.limit_w


@pytest.mark.parametrize("spec", LIMITED, ids=lambda spec: spec.name)
def test_a_lower_clock_never_draws_more_and_never_is_faster(spec: DeviceSpec) -> None:
    cluster = Cluster(spec, 1, 1, 1)
    ladder = (spec, *cluster.limiting_specs())
    powers = [stage_w(at) for at in ladder]
    assert powers == sorted(powers, reverse=True)
    assert all(a.speed >= b.speed for a, b in itertools.pairwise(ladder))


def test_clocks_above_the_one_that_boards_hold_change_nothing() -> None:
    spec = load_cluster("a100-pcie-80gb", 1).spec
    assert spec.sustained_share < 0.9
    for share in (0.9, 1.0):
        at = replace(spec, clock_share=share)
        assert (at.speed, stage_w(at)) == (1.0, stage_w(spec))
    clocks = load_cluster("a100-pcie-80gb", 1).clocks_hz
    assert clocks[0] == spec.clock_max_hz
    assert max(clocks[1:]) <= spec.sustained_share * spec.clock_max_hz + spec.clock_control.step_hz  # type: ignore[union-attr]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_load_is_slowed_down_until_it_meets_the_limit(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(LIMITED))
    at = with_power_limit(Cluster(spec, 1, 1, 1), data.draw(limits_of(spec))).spec
    natural_w = data.draw(st.floats(1.0, 2.0 * spec.limit_w))
    speed = speed_within(at, natural_w)
    assert 0 < speed <= 1
    if natural_w <= dynamic_limit_w(at):
        assert speed == 1
    elif spec.clock_control is None or speed < 0.3:
        joules = natural_w * (clock_power_factor(spec, 0.3) / 0.3 if spec.clock_control else 1.0)
        assert joules == pytest.approx(dynamic_limit_w(at) / speed)
    else:
        assert natural_w * clock_power_factor(spec, speed) == pytest.approx(dynamic_limit_w(at), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_lower_limit_never_lowers_time_or_raises_power_of_a_program(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(LIMITED))
    average_w = data.draw(st.floats(5.0, spec.limit_w))
    low, high = sorted(data.draw(limits_of(spec)) for _ in range(2))
    tight, loose, free = (
        program_under_limit(replace(spec, power_limit_w=w), average_w) for w in (low, high, spec.limit_w)
    )
    assert tight[0] >= loose[0] * (1 - 1e-9)
    assert tight[1] <= loose[1] * (1 + 1e-9)
    assert tight[1] <= max(low, min(average_w, spec.blocked_w)) * (1 + 1e-9)
    assert free[0] == pytest.approx(1.0)
    assert free[1] <= average_w * (1 + 1e-9)


@pytest.mark.parametrize("spec", [s for s in list_gpus() if s.clock_control is not None], ids=lambda s: s.name)
def test_every_curve_is_that_of_a_board(spec: DeviceSpec) -> None:
    """What no clock draws lies above 0, so that the thriftiest clock of large products is the ridge, not the least."""
    assert spec.clock_control is not None
    ridge = spec.clock_control.ridge_share / spec.sustained_share
    product_w = spec.gemm_share * rated_dynamic_w(spec)
    assert 0.85 * spec.limit_w <= spec.blocked_w + product_w <= spec.limit_w
    assert spec.idle_w < spec.blocked_w < 0.4 * spec.limit_w

    def energy(speed: float) -> float:
        return (spec.blocked_w + product_w * clock_power_factor(spec, speed)) / speed

    speeds = [0.3 + 0.01 * k for k in range(71)]
    best = min(speeds, key=energy)
    assert best == pytest.approx(ridge, abs=0.011)
    assert 0.6 <= best * spec.sustained_share <= 0.85
    times = [
        1 / speed_within(replace(spec, power_limit_w=share * spec.limit_w), product_w) for share in (0.9, 0.7, 0.5)
    ]
    assert times[0] < 1.1 < times[1] * 1.05 < 1.45
    assert 1.15 < times[2] < 2.2


def test_a_lower_limit_never_lowers_step_time_and_is_kept_by_every_kernel() -> None:
    cluster = curved_cluster()
    found = [predicted(with_power_limit(cluster, w)) for w in (150.0, 140.0, 120.0, 100.0, 80.0, 60.0, 51.0)]
    times = [figures.step_time_s.value for figures in found]
    assert times == sorted(times)
    assert times[-1] > 1.5 * times[0]
    for figures, limit_w in zip(found, (150.0, 140.0, 120.0, 100.0, 80.0, 60.0, 51.0), strict=True):
        assert figures.energy_by_cause["dynamic"] <= 4 * (limit_w - 50.0) * figures.step_time_s.value * (1 + 1e-9)
        assert figures.tdp_energy_j == pytest.approx(4 * 150.0 * figures.step_time_s.value)


def test_the_boards_own_limit_set_by_hand_changes_nothing() -> None:
    cluster = curved_cluster()
    assert predicted(with_power_limit(cluster, 150.0)) == predicted(cluster)


def test_locked_clocks_under_a_limit_are_never_faster_than_the_limit_lets() -> None:
    cluster = with_power_limit(curved_cluster(), 90.0)
    tables = CostTables(GRAPH, cluster)
    plan = whole_plan(tables)
    times, energies = [], []
    for clock_hz in (0.0, *cluster.clocks_hz[1:]):
        stages = tuple(replace(stage, clock_hz=clock_hz) for stage in plan.stages)
        figures = predict(tables, replace(plan, stages=stages))
        times.append(figures.step_time_s.value)
        energies.append(figures.energy_by_cause["dynamic"])
    assert times == pytest.approx(sorted(times))
    assert energies == pytest.approx(sorted(energies, reverse=True))


def test_energy_adds_up_over_stages() -> None:
    cluster = curved_cluster()
    whole, cut = (predicted(cluster, cuts).energy_by_cause["dynamic"] for cuts in ((), (2,)))
    assert cut == pytest.approx(whole)


@settings(max_examples=20, deadline=None)
@given(powers=st.tuples(st.floats(1.0, 140.0), st.floats(1.0, 140.0)))
def test_energy_never_falls_with_blocked_power(powers: tuple[float, float]) -> None:
    low, high = (
        sum(predicted(curved_cluster(blocked_w=w)).energy_by_cause[c] for c in ("dynamic", "blocked"))
        for w in sorted(powers)
    )
    assert low <= high * (1 + 1e-9)


@pytest.mark.parametrize("limit_w", [50.0, 0.0, -1.0, 150.1, float("nan"), float("inf")])
def test_limits_that_no_board_takes_are_refused(limit_w: float) -> None:
    with pytest.raises(InputError, match="power limit"):
        with_power_limit(plain_cluster(), limit_w)


def test_a_request_sets_the_limit_on_every_gpu() -> None:
    request = PlanRequest(num_gpus=2, gpu="v100-pcie-32gb", profile="none", gpu_power_limit_w=150.0)
    cluster = choose_target(request).cluster
    assert isinstance(cluster, Cluster)
    assert dynamic_limit_w(cluster.spec) == 150.0 - cluster.blocked_w
    free = choose_target(replace(request, gpu_power_limit_w=None)).cluster
    assert free.input_hash != cluster.input_hash
    with pytest.raises(InputError, match="power limit"):
        choose_target(replace(request, gpu_power_limit_w=20.0))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_tighter_deadline_never_lowers_energy(data: st.DataObject) -> None:
    spec = load_cluster("a100-pcie-80gb", 1).spec
    specs = (spec, *load_cluster("a100-pcie-80gb", 1).slower_specs())[::5]
    options = {}
    for stage in range(3):
        for kind in "FB":
            length_s, share = data.draw(st.floats(0.05, 0.2)), data.draw(st.floats(0.5, 1.0))
            times = [length_s * (share / at.speed + 1 - share) for at in specs]
            options[stage, kind] = tuple(
                ClockOption(1410 * at.clock_share, t, t * stage_w(at)) for at, t in zip(specs, times, strict=True)
            )
    instructions, arcs = pipeline_graph(3, 4)
    problem = ClockProblem(instructions, arcs, options, spec.blocked_w, (1, 1, 1))
    base_s = sum(max(o.time_s for o in rows) for rows in options.values()) * 4
    plans = frontier(problem, [base_s * factor for factor in (1.0, 1.1, 1.3, 1.6, 2.0)])
    energies = [plan.energy_j for plan in plans]
    assert energies == sorted(energies, reverse=True)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("energy")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@NEED_DATA
def test_published_iterations_from_their_stage_times(benchmark: ModuleType) -> None:
    tables = benchmark.read_tables([DATA])
    found = [run for run in benchmark.runs(tables) if len(set(run.limits_w)) == 1 and run.microbatches <= 32]
    lines = list(benchmark.given_lines(tables, found))
    assert len(lines) >= 15
    assert statistics.median(abs(line.error) for line in lines) < 0.10
    assert all(abs(line.error) < abs(line.naive / line.measured - 1) for line in lines)


@NEED_DATA
def test_clocks_save_at_least_what_published_plans_save_on_the_same_profile(benchmark: ModuleType) -> None:
    tables = benchmark.read_tables([DATA])
    few = replace(tables, points=[row for row in tables.points if row["n_microbatches"] == "12"])
    lines = list(benchmark.frontier_lines(few, True))
    savings = [line for line in lines if line.kind == "saving"]
    assert len(savings) == 1
    assert all(line.predicted >= line.measured for line in savings)
    assert all(abs(line.error) < 0.02 for line in lines if line.kind == "frontier")


@NEED_DATA
def test_published_power_limit_curves_of_single_gpus(benchmark: ModuleType) -> None:
    lines = list(benchmark.single_lines(benchmark.read_tables([DATA])))
    for group in {line.group for line in lines}:
        assert statistics.median(abs(line.error) for line in lines if line.group == group) < 0.06, group
