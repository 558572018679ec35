"""Measured devices: what takes the place of the device file's numbers, and the line through measured times."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cost.collective import collective_cost, send_cost
from autopar.cost.hardware import load_cluster, with_measured
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.mesh import stage_mesh
from autopar.ir.profile import DeviceProfile, MeasuredLine, MeasuredNumber
from autopar.ir.software import Software
from autopar.planner.request import PlanRequest, choose_target
from autopar.profiler import device
from autopar.profiler.device import ROUNDS, UPDATED, amid_computation_s, line, measure_rates, measure_update
from autopar.profiler.live import replay
from autopar.profiler.measure import Settings
from autopar.profiler.store import append_rows, read_store
from autopar.profiler.worker import measure_graphs, merged
from tests.toy_graphs import mlp_graph

BANDWIDTH = MeasuredNumber("memory.bandwidth_bytes_per_s", 3e9, "B/s", "a test")
FOUND = DeviceProfile(
    "cpu",
    (BANDWIDTH, MeasuredNumber("kernels.launch_overhead_s", 7e-6, "s", "a test")),
    (
        MeasuredLine("all_reduce", 2, 1e-3, 2e-9, 0.1),
        MeasuredLine("send", 2, 1e-4, 1e-9, 0.1),
        MeasuredLine("update:adamw", 1, 5e-4, 3e-9, 0.1),
    ),
    {"machine": "m", "date": "2026-01-01"},
)


def test_a_device_survives_the_file_and_rows_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [], replace(FOUND, numbers=()))
    append_rows(path, [], FOUND)
    append_rows(path, [], replace(FOUND, device="l4"))
    append_rows(path, [])
    contents = read_store(path)
    assert contents.devices == {"cpu": FOUND, "l4": replace(FOUND, device="l4")}
    assert contents.rows == ()


@pytest.mark.parametrize("change", ['"value": -1.0', '"value": NaN', '"value": "x"'])
def test_numbers_that_are_none_are_refused_by_line(tmp_path: Path, change: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [], FOUND)
    text = path.read_text()
    assert '"value": 3000000000.0' in text
    path.write_text(text.replace('"value": 3000000000.0', change))
    with pytest.raises(InputError, match=r"rows\.jsonl:1"):
        read_store(path)


def test_measured_numbers_replace_those_of_the_file_and_say_so() -> None:
    built_in = load_cluster("cpu", 2)
    measured = with_measured(built_in, FOUND)
    assert measured.spec.memory_bytes_per_s == 3e9
    assert measured.spec.launch_overhead_s == 7e-6
    assert measured.spec.capacity_bytes == built_in.spec.capacity_bytes
    assert {n.path for n in measured.provenance if n.tag == "measured"} == {n.path for n in FOUND.numbers}
    assert measured.input_hash != built_in.input_hash
    assert with_measured(built_in, None) is built_in


def test_measured_transfers_replace_modelled_ones_of_that_size_alone() -> None:
    built_in = load_cluster("cpu", 4)
    measured = with_measured(built_in, FOUND)
    two, four = stage_mesh(2).group(0), stage_mesh(4).group(0)
    assert collective_cost(measured, "all_reduce", two).time_s(1e6) == pytest.approx(1e-3 + 2e-3)
    assert collective_cost(measured, "all_reduce", four) == collective_cost(built_in, "all_reduce", four)
    assert collective_cost(measured, "all_gather", two) == collective_cost(built_in, "all_gather", two)
    assert send_cost(measured, same_node=True).time_s(1e6) == pytest.approx(1e-4 + 1e-3)


def test_a_measured_update_holds_for_the_runtime_that_was_measured() -> None:
    graph, cluster = mlp_graph(8, (16, 16)), with_measured(load_cluster("cpu", 1), FOUND)
    own, other = (
        CostTables(graph, cluster, software=software).table(stage_mesh(1), 1)
        for software in (Software(), Software(name="other"))
    )
    assert own is not None
    assert other is not None
    nodes = [n for n in own.nodes if n.kind == "param"]
    expected = sum(5e-4 + 3e-9 * graph.values[name].meta.num_bytes for n in nodes for name in n.names[:1])
    assert sum(float(n.step_s[0]) for n in nodes) == pytest.approx(expected)
    assert sum(float(n.step_s[0]) for n in other.nodes if n.kind == "param") < expected


def test_a_request_takes_the_device_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [], FOUND)
    target = choose_target(PlanRequest(num_gpus=2, gpu="cpu", profile=str(path)))
    assert target.cluster == with_measured(load_cluster("cpu", 2), FOUND)
    assert "5 numbers of the device" in target.profile.note
    assert choose_target(PlanRequest(num_gpus=2, gpu="cpu", profile="none")).cluster == load_cluster("cpu", 2)


def test_a_line_through_points_of_a_line_is_that_line() -> None:
    found = line("send", 2, [(size, 1e-4 + 2e-9 * size) for size in (1e3, 1e5, 1e7)])
    assert (found.latency_s, found.s_per_byte) == pytest.approx((1e-4, 2e-9))
    assert found.error < 1e-9


def test_no_line_has_a_negative_part() -> None:
    falling = line("send", 2, [(1e3, 2e-3), (1e6, 1e-3)])
    steep = line("send", 2, [(1e3, 1e-9), (1e6, 1e-3)])
    assert min(falling.latency_s, falling.s_per_byte, steep.latency_s, steep.s_per_byte) >= 0


def test_every_number_measured_is_one_of_the_device_file() -> None:
    settings = Settings(repeats=1)
    numbers = measure_rates(settings)
    cluster = with_measured(load_cluster("cpu", 1), DeviceProfile("cpu", numbers, measure_update(settings), {}))
    known = {n.path for n in load_cluster("cpu", 1).provenance}
    assert {n.path for n in numbers} <= known
    assert cluster.spec.gemm_efficiency <= 1


def test_processes_are_merged_by_their_middle() -> None:
    result = measure_graphs([mlp_graph(4, (8, 8))], Settings(repeats=1))
    slower = {**result, "rows": [{**row, "forward_s": row["forward_s"] + 2.0} for row in result["rows"]]}
    one, both = merged([result]), merged([result, slower])
    assert [r.key for r in both.rows] == [r.key for r in one.rows]
    assert [r.forward_s for r in both.rows] == pytest.approx([r.forward_s + 1.0 for r in one.rows])
    assert both.device == one.device


def test_live_bytes_are_the_highest_sum() -> None:
    assert replay([(1, 10), (2, 5), (1, -10), (3, 7), (2, -5)]) == (15, 7)


def test_a_block_where_one_lives_takes_its_place() -> None:
    assert replay([(1, 10), (1, 4), (2, 3)]) == (10, 7)


def test_a_transfer_takes_what_it_adds_to_a_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.dist, "barrier", lambda: None)
    taken = iter([1.0, *ROUNDS * [0.002, 0.004]])
    found = amid_computation_s([lambda: time.sleep(next(taken)) for _ in range(2)], "cpu")
    assert 0.003 <= found < 0.5
    assert next(taken, None) is None


def test_an_update_is_of_one_parameter_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "timed_runs", lambda run, settings: [run() or 3.0 * UPDATED])
    (found,) = measure_update(Settings(), (2**12, 2**14))
    assert (found.kind, found.latency_s, found.s_per_byte) == ("update:adamw", pytest.approx(3.0), pytest.approx(0.0))
