"""The search on captured models and real prices."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.cost.hardware import load_cluster
from autopar.cost.predict import predict
from autopar.cost.table import CostTables
from autopar.errors import InfeasibleError
from autopar.ir.graph import OpGraph
from autopar.ir.solution import Objective, Pins
from autopar.search import shared
from autopar.search.solve import search

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_GPT2 = {"layers": "2", "hidden": "64", "heads": "4", "seq": "32", "vocab": "128", "batch": "8"}


@pytest.fixture(scope="module")
def gpt2() -> OpGraph:
    return capture(load_source(str(EXAMPLES / "gpt2.py"), TINY_GPT2)).graph


@pytest.mark.parametrize("kind", ["time", "energy", "edp"])
@pytest.mark.parametrize("memory_bytes", [10**9, 3 * 10**6])
def test_assumed_bounds_change_nothing(
    gpt2: OpGraph, kind: str, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipping tables by the ideal bound finds the same optimum as making every table."""
    values = []
    for few in (0, 10**9):
        monkeypatch.setattr(shared, "FEW_TABLES", few)
        tables = CostTables(gpt2, load_cluster("a100-sxm-80gb", 4, memory_bytes=memory_bytes), pins=Pins())
        found = search(tables, Objective(kind), pins=Pins(), gap_tolerance=1e-6, max_microbatches=2)
        values.append(found.objective_value)
    assert values[0] == pytest.approx(values[1], rel=2e-6)


@pytest.mark.parametrize(("pp", "memory_bytes"), [(1, 10**9), (1, 3 * 10**6), (2, 10**9), (3, 2 * 10**6)])
def test_solution_agrees_with_the_planner_s_prediction(gpt2: OpGraph, pp: int, memory_bytes: int) -> None:
    """Formula and event simulation: equal on one stage, close on several; memory within the limit."""
    pins = Pins(pp=pp)
    tables = CostTables(gpt2, load_cluster("a100-sxm-80gb", 4, memory_bytes=memory_bytes), pins=pins)
    solution = search(tables, Objective("time"), pins=pins)
    predicted = predict(tables, solution.decisions)
    tolerance = 1e-9 if pp == 1 else 0.3
    assert predicted.step_time_s.value == pytest.approx(solution.time_s, rel=tolerance)
    assert predicted.energy_j.value == pytest.approx(solution.energy_j, rel=tolerance)
    assert max(q.value for q in predicted.peak_memory_bytes) <= tables.device.memory_bytes * (1 + 1e-9)


def test_tighter_memory_costs_more_until_nothing_fits(gpt2: OpGraph) -> None:
    last = 0.0
    for memory_bytes in (10**9, 4 * 10**6, 2 * 10**6):
        tables = CostTables(gpt2, load_cluster("a100-sxm-80gb", 4, memory_bytes=memory_bytes), pins=Pins())
        value = search(tables, Objective("time"), pins=Pins()).objective_value
        assert value >= last * (1 - 1e-3)
        last = value
    tables = CostTables(gpt2, load_cluster("a100-sxm-80gb", 4, memory_bytes=10**5), pins=Pins())
    with pytest.raises(InfeasibleError) as caught:
        search(tables, Objective("time"), pins=Pins())
    assert caught.value.remedies


def test_alexnet_on_k20_splits_convolutions_by_samples_and_linears_by_features() -> None:
    """Krizhevsky 2014, "One weird trick": it follows from the prices alone."""
    graph = capture(load_source(str(EXAMPLES / "alexnet.py"), {})).graph
    tables = CostTables(graph, load_cluster("k20", 8), pins=Pins())
    decisions = search(tables, Objective("time"), pins=Pins()).decisions
    labels = {op.name: [axis.label for axis in decisions.ops[op.name]] for op in graph.ops}
    convolutions = [op.name for op in graph.ops if op.target == "aten.conv2d.default"]
    linears = [op.name for op in graph.ops if op.target == "aten.linear.default"]
    assert all(set(labels[name]) == {"dim0"} for name in convolutions)
    for name in linears[:2]:
        assert set(labels[name]) <= {"columns", "contract"}
    assert any(label in ("columns", "contract") for label in labels[linears[2]])
