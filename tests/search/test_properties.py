"""What must hold of every search: honest bounds, monotonicity, determinism, infeasibility with a computed need."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError, SolverLimitError
from autopar.ir.cost import CostTable
from autopar.ir.mesh import StageMesh, stage_mesh
from autopar.ir.solution import Objective, Pins
from autopar.search.brute import brute_force
from autopar.search.evaluate import Layout, evaluate
from autopar.search.infeasible import _least
from autopar.search.shared import Space
from autopar.search.solve import search
from autopar.search.space import list_skeletons, mesh_sizes, microbatch_counts
from autopar.units import format_bytes
from tests.strategies import FakeDevice, FakeSource, fake_sources

FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TIME = Objective("time")


def optimum(source: FakeSource, objective: Objective, pins: Pins = Pins()) -> float:  # noqa: B008
    try:
        return search(source, objective, pins=pins, gap_tolerance=1e-7).objective_value
    except (InfeasibleError, InputError):
        return math.inf


@FEW
@given(source=fake_sources(), kind=st.sampled_from(["time", "energy", "edp"]), more=st.integers(0, 20_000))
def test_more_memory_never_costs_more(source: FakeSource, kind: str, more: int) -> None:
    device = replace(source.device, memory_bytes=source.device.memory_bytes + more)
    looser = replace(source, device=device)
    assert optimum(looser, Objective(kind)) <= optimum(source, Objective(kind)) * (1 + 1e-6)


@FEW
@given(source=fake_sources(), pp=st.sampled_from([1, 2]), recompute=st.sampled_from(["none", "full"]))
def test_fewer_pins_never_cost_more(source: FakeSource, pp: int, recompute: str) -> None:
    pinned = optimum(source, TIME, Pins(pp=pp, recompute=recompute))
    assert optimum(source, TIME) <= pinned * (1 + 1e-6)


@FEW
@given(source=fake_sources(), tolerance=st.sampled_from([1e-7, 0.01, 0.3]))
def test_bound_holds_at_any_tolerance(source: FakeSource, tolerance: float) -> None:
    oracle = brute_force(source, TIME, pins=Pins())
    if oracle.decisions is None:
        return
    found = search(source, TIME, pins=Pins(), gap_tolerance=tolerance)
    assert found.bound <= oracle.value * (1 + 1e-9)
    assert oracle.value <= found.objective_value * (1 + 1e-9)
    assert found.gap <= tolerance
    assert found.status == "optimal"


@FEW
@given(source=fake_sources())
def test_same_input_same_solution(source: FakeSource) -> None:
    def run(reverse: bool) -> object:
        fresh = FakeSource(
            source.seed, source.classes, source.batch_size, source.device, source.with_parameter, source.with_shared,
            source.forbid, reverse,
        )  # fmt: skip
        try:
            return replace(search(fresh, TIME, pins=Pins()), wall_s=0.0)
        except (InfeasibleError, InputError) as error:
            return str(error)

    assert run(False) == run(True)


@FEW
@given(source=fake_sources(memory=(1, 400)))
def test_infeasible_names_the_smallest_reachable_peak(source: FakeSource) -> None:
    oracle = brute_force(source, TIME, pins=Pins())
    if oracle.decisions is not None or not math.isfinite(oracle.least_peak_bytes):
        return
    with pytest.raises(InfeasibleError) as caught:
        search(source, TIME, pins=Pins())
    assert caught.value.limit == "memory"
    assert caught.value.remedies
    space = Space(source, "1f1b", 1e-3, list_skeletons(source, Pins(), use_all=False, max_microbatches=None))
    found = _least(space, list(space.skeletons), True)
    assert found is not None
    assert found.peak == pytest.approx(oracle.least_peak_bytes, rel=1e-3)
    assert format_bytes(found.peak) in caught.value.need


def test_time_limit_returns_an_incumbent_or_says_so() -> None:
    source = FakeSource(3, (0, 1, 1, 2), 4, FakeDevice(10**6, 4))
    with pytest.raises(SolverLimitError):
        search(source, TIME, pins=Pins(), time_limit_s=-1.0)
    found = search(source, TIME, pins=Pins(), time_limit_s=60.0)
    assert found.bound <= found.objective_value


def test_progress_is_told_each_refinement() -> None:
    seen: list[dict[str, object]] = []
    search(FakeSource(1, (0, 1), 2, FakeDevice(10**6, 2)), TIME, pins=Pins(), progress=seen.append)
    assert seen
    assert {"skeleton", "level", "bound", "incumbent", "least"} == set(seen[0])


@pytest.mark.parametrize(
    ("pins", "fragment"),
    [
        (Pins(num_microbatches=3), "3 microbatches do not divide"),
        (Pins(dp=8), "dp=8"),
        (Pins(pp=3), "only 2 blocks"),
        (Pins(pp=0), "pp=0 is below 1"),
        (Pins(schedule="zb"), "unknown schedule"),
        (Pins(recompute="half"), "unknown recompute"),
    ],
)
def test_impossible_pins_are_input_errors(pins: Pins, fragment: str) -> None:
    with pytest.raises(InputError, match=fragment):
        search(FakeSource(1, (0, 1), 4, FakeDevice(10**6, 4)), TIME, pins=pins)


def test_meshes_are_all_factorisations() -> None:
    assert list(mesh_sizes(12, Pins())) == [(12,), (2, 6), (3, 4), (4, 3), (6, 2)]
    assert list(mesh_sizes(4, Pins(dp=4, tp=1))) == [(4, 1)]
    assert list(mesh_sizes(4, Pins(dp=2))) == [(2, 2)]


def test_microbatch_counts_thin_out_divisors() -> None:
    assert microbatch_counts(64, None, None) == (1, 2, 4, 8, 16, 32, 64)
    assert microbatch_counts(12, None, None) == (1, 2, 3, 6, 12)
    assert microbatch_counts(64, 8, None) == (1, 2, 4, 8)


def test_evaluate_by_hand() -> None:
    """Two stages of one block: figures worked out from the definitions."""
    source = FakeSource(5, (0, 1), 4, FakeDevice(10**6, 2, 2, 10.0, 5.0), forbid=0.0)
    table = source.table(stage_mesh(1), 2)
    assert table is not None
    choice = (0,) * len(table.nodes)
    figures = evaluate(table, source.device, Layout(2, (0, 1), (False, True)), choice)
    first = [n for n in table.nodes if n.blocks == (0,)]
    second = [n for n in table.nodes if n.blocks == (1,)]
    edges = [e for e in table.edges if e.blocks == (1,)]
    size = table.crossings[0].bytes_by_choice[0]
    t0 = sum(n.forward_s[0] + n.backward_s[0] for n in first)
    t0 += sum(e.forward_s[0, 0] + e.backward_s[0, 0] for e in table.edges if e.blocks == (0,))
    t1 = sum(2 * n.forward_s[0] + n.backward_s[0] for n in second)
    t1 += sum(2 * e.forward_s[0, 0] + e.backward_s[0, 0] for e in edges) + 2 * (0.01 + size * 1e-5)
    g0, g1 = (sum(n.step_s[0] for n in nodes) for nodes in (first, second))
    assert figures.stage_s == pytest.approx((t0, t1))
    assert figures.time_s == pytest.approx(t0 + t1 + (g0 + g1) / 2 + max(t0 + g0 / 2, t1 + g1 / 2))
    memory_0 = sum(n.state_bytes[0] + 2 * n.activation_bytes[0] for n in first) + max(
        n.workspace_bytes[0] for n in first
    )
    assert figures.memory_bytes[0] == pytest.approx(memory_0)
    memory_1 = sum(n.state_bytes[0] + n.boundary_bytes[0] + n.activation_bytes[0] for n in second)
    expected_w = 2 * 10.0 + 1 * 5.0
    dynamic_j = sum(2 * n.microbatch_j[0] + n.step_j[0] for n in first)
    dynamic_j += sum(2 * e.microbatch_j[0, 0] for e in table.edges if e.blocks == (0,))
    again = [(n.microbatch_j[0], n.forward_s[0], n.backward_s[0]) for n in second]
    again += [(e.microbatch_j[0, 0], e.forward_s[0, 0], e.backward_s[0, 0]) for e in edges]
    dynamic_j += sum(2 * j * (1 + (f / (f + b) if f + b else 0.0)) for j, f, b in again)
    dynamic_j += sum(n.step_j[0] for n in second) + 2 * 2 * size * 1e-4
    assert figures.energy_j == pytest.approx(dynamic_j + expected_w * figures.time_s)
    assert figures.memory_bytes[1] == pytest.approx(memory_1 + max(n.workspace_bytes[0] for n in second))


def test_an_interrupt_returns_the_best_plan_so_far() -> None:
    source = FakeSource(3, (0, 1, 1, 2), 4, FakeDevice(10**6, 4))
    whole = search(source, TIME, pins=Pins(), gap_tolerance=1e-9)

    class Stopping(FakeSource):
        """Interrupts when the third table is asked for."""

        def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
            if len(self.made) == 3 and (mesh.sizes, num_microbatches) not in self.made:
                raise KeyboardInterrupt
            return super().table(mesh, num_microbatches)

    found = search(Stopping(3, (0, 1, 1, 2), 4, FakeDevice(10**6, 4)), TIME, pins=Pins(), gap_tolerance=1e-9)
    assert found.is_interrupted
    assert found.bound <= whole.objective_value <= found.objective_value * (1 + 1e-9)
