"""Pinned sequence parallelism, context and expert axes: which choices are left, and the memory that papers derive."""

from __future__ import annotations

from functools import cache

import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.cost.hardware import load_cluster
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.cost import CostTable
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.solution import Objective, Pins
from autopar.planner.plan import Planned, make_plan
from autopar.planner.request import PlanRequest
from autopar.rules.batch import batch_dims
from autopar.rules.sequence import sequence_parts
from autopar.search.space import mesh_sizes

SEQ, SAMPLES, HIDDEN, HEADS = 1024, 4, 1024, 16
OPTIONS = {
    "hidden": str(HIDDEN), "heads": str(HEADS), "seq": str(SEQ), "vocab": "1024", "attention": "unfused",
    "dropout": "0.1", "dtype": "fp16",
}  # fmt: skip


@cache
def planned(layers: int, tp: int, sequence: bool | None) -> Planned:
    pins = Pins(dp=1, tp=tp, pp=1, num_microbatches=2, recompute="none", zero=0, sequence=sequence)
    request = PlanRequest(
        num_gpus=tp,
        gpu="a100-sxm-80gb",
        objective=Objective("time"),
        pins=pins,
        use_all=True,
        batch_size=2 * SAMPLES,
        with_baselines=False,
    )
    return make_plan("gpt", {**OPTIONS, "layers": str(layers)}, request)


def layer_bytes(tp: int, sequence: bool | None) -> float:
    """Activations that one layer more keeps of a microbatch."""
    few, many = (planned(n, tp, sequence).plan.predicted.stages[0].memory_by_cause["activations"] for n in (3, 5))
    return (many - few) / 2


@pytest.mark.parametrize(("tp", "sequence"), [(1, None), (4, False), (4, True)])
def test_a_layer_keeps_what_korthikanti_et_al_count(tp: int, sequence: bool | None) -> None:
    """Table 2 of Korthikanti et al. 2022; under sequence parallelism they gather two norms' outputs again instead."""
    whole, scores = SEQ * SAMPLES * HIDDEN, 5 * HEADS * SEQ / HIDDEN
    if sequence:
        expected = whole / tp * (34 + scores) + 2 * 2 * whole * (1 - 1 / tp)
    else:
        expected = whole * (10 + (24 + scores) / tp)
    assert layer_bytes(tp, sequence) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sequence", [True, False])
def test_only_the_stream_is_split_along_the_sequence(sequence: bool) -> None:
    found = planned(3, 4, sequence)
    parts = sequence_parts(found.graph, batch_dims(found.graph))
    assert parts.stream
    for op in found.graph.ops:
        strategy = found.plan.decisions.ops[op.name][1]
        assert parts.splits(op, strategy) == (sequence and op.name in parts.stream), op
        if op.name in parts.stream and not sequence:
            assert strategy.label == "replicate"
        if op.name in parts.lookups:
            assert strategy.label == "rows"
        if "linear" in op.target:
            assert strategy.label in ("columns", "contract")


@cache
def tiny(source: str) -> OpGraph:
    sizes = {"layers": "2", "hidden": "32", "heads": "4", "kv_heads": "4", "ffn": "64", "vocab": "64", "seq": "16"}
    others = {"experts": "4", "dtype": "float32"} if source.endswith("mixtral.py") else {}
    return capture(load_source(source, {**sizes, **others, "batch": "8"})).graph


def labels(table: CostTable, axis: int) -> dict[str, set[str]]:
    return {node.name: {choice[axis].label for choice in node.choices} for node in table.nodes if node.kind == "op"}


def test_a_context_axis_splits_positions_wherever_there_are_any() -> None:
    graph = tiny("llama")
    tables = CostTables(graph, load_cluster("h100-sxm-80gb", 4), pins=Pins(dp=2, tp=1, cp=2, zero=1))
    table = tables.table(stage_mesh(2, 1, 2, 1), 1)
    assert table is not None
    found = labels(table, 2)
    assert {frozenset(own) for own in found.values()} <= {frozenset({name}) for name in ("dim1", "dim2", "context")} | {
        frozenset({"replicate"}), frozenset({"tokens1"})
    }  # fmt: skip
    attention = next(op.name for op in graph.ops if "attention" in op.target)
    assert found[attention] == {"context"}
    parameters = [node for node in table.nodes if node.kind == "param"]
    assert {choice[axis].label for node in parameters for choice in node.choices for axis in (0, 2)} == {"zero1"}


def test_an_experts_axis_splits_experts_and_else_samples() -> None:
    graph = tiny("examples/mixtral.py")
    tables = CostTables(graph, load_cluster("h100-sxm-80gb", 2), pins=Pins(dp=2, tp=1, ep=2))
    table = tables.table(stage_mesh(1, 2, 1, 1), 1)
    assert table is not None
    found = labels(table, 1)
    regions = {op.name for op in graph.ops if op.target == "autopar.moe_experts"}
    assert all(own <= {"experts", "exchange"} for name, own in found.items() if name in regions)
    assert all(not own & {"experts", "exchange"} for name, own in found.items() if name not in regions)
    assert CostTables(graph, load_cluster("h100-sxm-80gb", 16), pins=Pins(dp=16, tp=1, ep=2)).table(
        stage_mesh(8, 2, 1, 1), 1
    ) is None  # fmt: skip


@pytest.mark.parametrize(
    ("num_devices", "pins", "meshes"),
    [
        (8, Pins(dp=2, tp=2, cp=2), [(2, 1, 2, 2)]),
        (8, Pins(dp=4, tp=2, ep=2), [(2, 2, 1, 2)]),
        (16, Pins(dp=4, tp=2, ep=4, cp=2), [(1, 4, 2, 2)]),
        (8, Pins(dp=2, tp=2), [(2, 2)] * 0),
        (8, Pins(tp=2, cp=2), [(2, 1, 2, 2)]),
        (6, Pins(dp=2, tp=1, cp=2), []),
    ],
)
def test_meshes_have_the_axes_that_are_pinned(num_devices: int, pins: Pins, meshes: list[tuple[int, ...]]) -> None:
    assert list(mesh_sizes(num_devices, pins)) == meshes


def test_a_mesh_that_does_not_fit_is_refused_with_all_its_axes() -> None:
    request = PlanRequest(num_gpus=4, gpu="h100-sxm-80gb", pins=Pins(dp=2, tp=2, cp=2), with_baselines=False)
    with pytest.raises(InputError, match="no mesh with dp=2, tp=2, cp=2 uses at most 4 GPUs"):
        make_plan("gpt", {"layers": "1", "hidden": "32", "heads": "4", "vocab": "64", "seq": "16"}, request)
