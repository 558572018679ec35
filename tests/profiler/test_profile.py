"""The profile store, measuring on the CPU, and what the cost model makes of rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost.hardware import load_cluster
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.graph import Ref
from autopar.ir.mesh import stage_mesh
from autopar.ir.profile import OpProfile, ProfileKey
from autopar.ir.tensor import TensorMeta
from autopar.meters import Reading, ReplayMeter, WindowRules
from autopar.profiler.measure import EnergyProbe, Settings, _operands, local_ops, profile_ops
from autopar.profiler.store import ProfileStore, append_rows, load_profile, read_rows
from tests.toy_graphs import attention_graph, mlp_graph

GRAPH = mlp_graph(8, (16, 32, 16))
FAST = Settings(repeats=3)
BRIEF = WindowRules(window_s=0.01, trials=1, warm_up_s=0.0, cool_down_s=0.0)
PROVENANCE = {"machine": "m", "date": "2026-01-01", "torch": "2"}


def row(target: str = "aten.relu.default", size: int = 4, forward_s: float = 1e-6, device: str = "cpu") -> OpProfile:
    key = ProfileKey(target, (TensorMeta((size, 2), "float32"),), (Ref(0),), (), device)
    return OpProfile(key, forward_s, 2e-6, 0.1, None, None, 5, PROVENANCE)


args = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-1, 1)
    | st.text(max_size=4)
    | st.builds(Ref, st.just(0)),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@given(
    arguments=st.lists(args, max_size=3).map(tuple),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    numbers=st.tuples(st.floats(0, 1), st.floats(0, 1), st.none() | st.integers(0, 99), st.none() | st.floats(0, 9)),
)
def test_rows_survive_the_file(tmp_path_factory: pytest.TempPathFactory, arguments, shape, numbers) -> None:  # type: ignore[no-untyped-def]
    key = ProfileKey("aten.x", (TensorMeta(shape, "int64"),), arguments, (("k", arguments),), "cpu")
    made = OpProfile(key, numbers[0], numbers[1], 0.0, numbers[2], numbers[3], 3, PROVENANCE)
    path = tmp_path_factory.mktemp("store") / "rows.jsonl"
    append_rows(path, [made])
    assert read_rows(path) == (made,)


def test_later_rows_replace_earlier_ones_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row(), row(size=8)])
    assert append_rows(path, [row(forward_s=5e-6)]) == 2
    store = load_profile(path, "cpu")
    found = store.find(row().key)
    assert found is not None
    assert found.forward_s == 5e-6
    assert len(store) == 2


def test_a_store_serves_one_device() -> None:
    store = ProfileStore([row(), row(device="l4")], "l4")
    assert store.find(row().key) is None
    assert store.find(row(device="l4").key) is not None
    assert store.has_target("aten.relu.default")
    assert not store.has_target("aten.linear.default")


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"target": "x"}', '{"target": 1, "inputs": [[[2], "float33"]]}', "\x00"]
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row()])
    before = path.read_text()
    path.write_text(before + line + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:2"):
        append_rows(path, [row()])
    assert path.read_text() == before + line + "\n"


def test_times_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [replace(row(), forward_s=math.nan)])
    with pytest.raises(InputError, match="finite"):
        read_rows(path)


def test_missing_and_unwritable_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(tmp_path / "none.jsonl", "cpu")
    with pytest.raises(InputError, match="cannot be written"):
        append_rows(tmp_path / "no" / "rows.jsonl", [row()])


def test_measured_rows_take_the_place_of_modelled_prices() -> None:
    run = profile_ops(GRAPH, FAST)
    assert run.skipped == {}
    store = ProfileStore(run.rows, "cpu")
    cluster = load_cluster("cpu", 2)
    modelled, measured = (
        CostTables(GRAPH, cluster, profile=profile).table(stage_mesh(2), 1) for profile in (None, store)
    )
    assert modelled is not None
    assert measured is not None
    ops = sum(len(node.choices) for node in measured.nodes if node.kind == "op")
    assert measured.labels["measured"] == ops
    assert measured.labels["modelled"] == modelled.labels["modelled"] - ops
    times = {node.name: node.forward_s[0] for node in measured.nodes}
    whole = {r.key.target: r.forward_s for r in run.rows if r.key.inputs[0].shape == (8, 32)}
    assert times["relu_0"] == whole["aten.relu.default"]


def test_every_row_says_where_it_is_from_and_takes_time() -> None:
    for found in profile_ops(attention_graph(), FAST).rows:
        assert found.forward_s > 0
        assert found.repeats == 3
        assert {"machine", "date", "torch", "threads"} <= set(found.provenance)
        assert "view" not in found.key.target


def test_a_slower_op_measures_slower() -> None:
    small, large = (
        next(r for r in profile_ops(mlp_graph(64, (n, n)), Settings(axis_sizes=(1,))).rows if "linear" in r.key.target)
        for n in (16, 1024)
    )
    assert large.forward_s > small.forward_s
    assert large.backward_s > small.backward_s


def test_energy_is_what_the_meter_reads_above_blocked_power() -> None:
    readings = [Reading(11.0, "measured", "replay", "package", 1.0)] * 2
    settings = Settings(axis_sizes=(1,), repeats=1, energy=EnergyProbe(ReplayMeter(readings), 10.0, BRIEF))
    rows = profile_ops(mlp_graph(8, (4, 4)), settings).rows
    assert len(rows) == 2
    assert all(r.energy_j is not None and 0 < r.energy_j <= 1.0 for r in rows)


def test_energy_that_the_meter_does_not_know_stays_unknown() -> None:
    settings = Settings(axis_sizes=(1,), repeats=1, energy=EnergyProbe(ReplayMeter([]), 10.0, BRIEF))
    assert all(r.energy_j is None for r in profile_ops(mlp_graph(8, (4, 4)), settings).rows)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="tpu"):
        profile_ops(GRAPH, Settings(device="tpu"))


def test_trap_operands_are_random_since_power_depends_on_the_bits() -> None:
    """Zeros draw far less power in products than what is trained on."""
    keys = [key for key, _ in local_ops(mlp_graph(8, (16, 32)), Settings(axis_sizes=(1,)))]
    for key in keys:
        for operand in _operands(key, (False,) * len(key.inputs), "cpu")[0]:
            if operand.is_floating_point():
                assert operand.unique().numel() > 0.9 * operand.numel()
