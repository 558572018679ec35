"""Which clocks and limits a plan asks of which boards, what is refused, and how a run's energy is labelled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cli.app import invoke
from autopar.errors import InputError
from autopar.ir.hosts import Hosts
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.meters import NodeReading, Reading, unknown
from autopar.planner.run_energy import Window, run_energy
from autopar.planner.settings import BoardSettings, check_settings, held_boards, node_ranks, switching_of
from tests.machine import Machine, make_machine
from tests.nvml_double import NO_PERMISSION, FakeBoard
from tests.planner.plans import tiny_plan

H100 = "NVIDIA H100 80GB HBM3"
LOCK = BoardSettings(lock_clocks=True)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Four boards of the plan's type."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield from make_machine(tmp_path, monkeypatch, *(FakeBoard(name=H100) for _ in range(4)))


def clocked(first_hz: float = 1080e6, second_hz: float = 900e6, limit_w: float | None = None) -> Plan:
    """Two stages on two GPUs each."""
    plan = tiny_plan()
    stages = [
        replace(stage, clock_hz=hz) for stage, hz in zip(plan.decisions.stages, (first_hz, second_hz), strict=True)
    ]
    cluster = replace(plan.cluster, gpu_power_limit_w=limit_w)
    return replace(plan, cluster=cluster, decisions=replace(plan.decisions, stages=tuple(stages)))


def told(plan: Plan, settings: BoardSettings, ranks: range = range(4), **environment: str) -> list[str]:
    said: list[str] = []
    with held_boards(plan, settings, ranks, said.append, environment):
        pass
    return said


def test_each_rank_s_board_gets_the_clock_of_its_stage(machine: Machine) -> None:
    with held_boards(clocked(limit_w=300.0), BoardSettings(True, True), range(4), None, {}) as held:
        assert machine.settings() == [(mhz, 300.0, (1593, 1410)) for mhz in (1080.0, 1080.0, 900.0, 900.0)]
    assert held.clocks_mhz == {0: 1080.0, 1: 1080.0, 2: 900.0, 3: 900.0}
    assert machine.is_clean()


def test_the_second_node_of_two_sees_to_its_own_ranks(machine: Machine) -> None:
    assert node_ranks(4, Hosts(2, 1, "10.0.0.1", 29500), {}) == range(2, 4)
    assert node_ranks(4, Hosts(), {}) == range(4)
    torchrun = {"RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert node_ranks(4, Hosts(), torchrun) == range(2, 4)
    assert not node_ranks(4, Hosts(), {**torchrun, "RANK": "3", "LOCAL_RANK": "1"})
    with held_boards(clocked(), LOCK, range(2, 4), None, {}) as held:
        assert held.clocks_mhz == {0: 900.0, 1: 900.0}


def test_ranks_that_another_process_sees_to_set_nothing(machine: Machine) -> None:
    assert told(clocked(), LOCK, range(0)) == []
    assert machine.is_clean()


def test_boards_are_those_that_cuda_shows(machine: Machine) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "3,2,1,0"}
    with held_boards(clocked(), LOCK, range(4), None, environment) as held:
        assert held.clocks_mhz == {3: 1080.0, 2: 1080.0, 1: 900.0, 0: 900.0}


ROWS = [(0, "F", (900.0, 1200.0)), (0, "B", (1080.0, 1080.0)), (1, "F", (705.0, 705.0)), (1, "B", (600.0, 690.0))]


def schedule_file(directory: Path, rows: list[tuple[int, str, tuple[float, ...]]], **more: str) -> str:
    content = {"stages": [{"stage": s, "kind": k, "microbatches": [0, 1], "clocks_mhz": c} for s, k, c in rows]}
    path = directory / "clocks.json"
    path.write_text(json.dumps(content | more))
    return str(path)


def test_short_instructions_get_the_highest_clock_of_their_board_and_the_run_says_so(
    machine: Machine, tmp_path: Path
) -> None:
    settings = BoardSettings(schedule=schedule_file(tmp_path, ROWS))
    with held_boards(tiny_plan(), settings, range(4), None, {}) as held:
        assert held.clocks_mhz == {0: 1200.0, 1: 1200.0, 2: 705.0, 3: 705.0}
        assert switching_of(tiny_plan(), settings, held, range(4), {}) is None
    assert "the shortest of 8 instructions takes 1 ms" in held.notes[0]
    assert "the highest of its own" in held.notes[0]


def test_long_instructions_get_clocks_of_their_own(machine: Machine, tmp_path: Path) -> None:
    settings = BoardSettings(schedule=schedule_file(tmp_path, ROWS), switch_s=1e-4)
    with held_boards(tiny_plan(), settings, range(4), None, {}) as held:
        found = switching_of(tiny_plan(), settings, held, range(4), {})
        assert found is not None
        assert Path(found["state"]).is_file()
    assert not Path(found["state"]).exists()
    assert [found["ranks"][str(rank)]["board"][:12] for rank in range(4)] == [f"GPU-{i:08d}" for i in range(4)]
    assert sorted(found["ranks"]["2"]["clocks"]) == [
        ("B", 0, 600.0), ("B", 1, 690.0), ("F", 0, 705.0), ("F", 1, 705.0),
    ]  # fmt: skip
    assert "each GPU changes its clock between instructions" in held.notes[0]
    assert machine.is_clean()


def test_halves_of_a_backward_share_the_highest_clock_of_their_board(machine: Machine, tmp_path: Path) -> None:
    plan = tiny_plan()
    plan = replace(plan, decisions=replace(plan.decisions, schedule="zero-bubble"))
    halves = [(0, "W", (1305.0, 900.0)), (1, "W", (600.0, 600.0))]
    settings = BoardSettings(schedule=schedule_file(tmp_path, [*ROWS, *halves]), switch_s=1e-6)
    with held_boards(plan, settings, range(4), None, {}) as held:
        assert switching_of(plan, settings, held, range(4), {}) is None
        assert held.clocks_mhz == {0: 1305.0, 1: 1305.0, 2: 705.0, 3: 705.0}
    assert "halves of backward" in held.notes[0]


def test_clocks_are_not_changed_where_they_are_not_locked(machine: Machine, tmp_path: Path) -> None:
    machine.set(*(FakeBoard(name=H100, refused={"SetGpuLockedClocks": NO_PERMISSION}) for _ in range(4)))
    settings = BoardSettings(schedule=schedule_file(tmp_path, ROWS), switch_s=1e-4)
    with held_boards(tiny_plan(), settings, range(4), None, {}) as held:
        assert switching_of(tiny_plan(), settings, held, range(4), {}) is None
    assert held.commands[0] == "sudo nvidia-smi -i 0,1 -lgc 1200,1200"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"stages": [{"stage": 0, "clocks_mhz": [1]}]}', '{"stages": [3]}'])
def test_a_file_that_is_no_schedule_is_refused(machine: Machine, tmp_path: Path, text: str) -> None:
    (tmp_path / "clocks.json").write_text(text)
    with pytest.raises(InputError, match="--clock-schedule"):
        told(tiny_plan(), BoardSettings(schedule=str(tmp_path / "clocks.json")))


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        (ROWS[:3], {}, "lacks B of microbatch 0 on rank 1"),
        ([*ROWS, (2, "F", (900.0, 900.0))], {}, "has, and the plan has not, F of microbatch 0 on rank 2"),
        ([*ROWS[:3], (1, "B", (0.0, 690.0))], {}, "a clock of 0 MHz"),
        (ROWS, {"plan": "0123"}, "made for another plan"),
    ],
)
def test_a_schedule_of_another_plan_is_refused(
    tmp_path: Path, rows: list[tuple[int, str, tuple[float, ...]]], more: dict[str, str], words: str
) -> None:
    name = schedule_file(tmp_path, rows, **more)
    with pytest.raises(InputError, match=words):
        check_settings(tiny_plan(), BoardSettings(schedule=name))


def test_a_plan_made_after_a_failure_keeps_the_clocks_of_its_stages(tmp_path: Path) -> None:
    settings = BoardSettings(set_power_limit=True, schedule=schedule_file(tmp_path, ROWS))
    assert settings.for_another_plan() == BoardSettings(lock_clocks=True, set_power_limit=True)


def test_a_limit_that_the_plan_does_not_have_is_refused(machine: Machine) -> None:
    with pytest.raises(InputError, match="--gpu-power-limit"):
        told(clocked(), BoardSettings(set_power_limit=True))


def test_stages_that_the_plan_leaves_alone_are_left_alone_and_told(machine: Machine) -> None:
    said = told(clocked(second_hz=0.0), LOCK)
    assert "the plan leaves the clocks of stages 1 alone" in said[0]
    assert machine.boards()[3].log == []
    assert "leaves all clocks alone" in told(clocked(0.0, 0.0), LOCK)[0]


@pytest.mark.parametrize(
    ("boards", "words"),
    [
        ([FakeBoard(name=H100)] * 3, "no GPU each"),
        ([FakeBoard()] * 4, "the plan is for h100-sxm-80gb, rank 0 runs on a100-sxm-80gb"),
        ([FakeBoard(name=H100), FakeBoard(name="NVIDIA L4")] * 2, "CUDA_DEVICE_ORDER"),
        ([FakeBoard(name=H100, refused={"SetGpuLockedClocks": NO_PERMISSION})] * 4, "Insufficient Permissions"),
    ],
)
def test_what_is_not_applied_is_told_and_nothing_is_set(machine: Machine, boards: list[FakeBoard], words: str) -> None:
    machine.set(*(replace(board) for board in boards))
    said = told(clocked(), LOCK)
    assert any(words in line for line in said)
    assert all(board.log == [] for board in machine.boards())


def test_the_administrator_s_commands_are_told(machine: Machine) -> None:
    machine.set(*(FakeBoard(name=H100, refused={"SetGpuLockedClocks": NO_PERMISSION}) for _ in range(4)))
    said = told(clocked(), LOCK)
    assert said[-3:] == [
        "sudo nvidia-smi -i 0,1 -lgc 1080,1080",
        "sudo nvidia-smi -i 2,3 -lgc 900,900",
        "sudo nvidia-smi -i 0,1,2,3 -rgc   # afterwards",
    ]


def test_a_machine_without_a_driver_says_so(machine: Machine) -> None:
    machine.file.unlink()
    machine.set()
    assert "no GPU each" in told(clocked(), LOCK)[0]


def leave_behind(machine: Machine, namespace: str | None = None) -> None:
    """What a run leaves that died with its guardian, or that lives in another container."""
    machine.states.mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    board = {"uuid": machine.boards()[1].uuid, "index": 1, "application_mhz": None, "limit_w": 350.0}
    content = {
        "boot": boot,
        "namespace": namespace or os.readlink("/proc/self/ns/pid"),
        "owner": 2**22 + 1,
        "owner_started": "1",
        "boards": [{**board, "touched": ["power limit"]}],
    }
    (machine.states / "dead.json").write_text(json.dumps(content))


def test_a_run_warns_of_what_a_dead_one_left_and_unlock_restores_it(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_behind(machine)
    assert "autopar unlock" in told(tiny_plan(), BoardSettings())[0]
    assert invoke(["unlock"]) == 0
    assert capsys.readouterr().out == "GPU 1: power limit back to 350 W\n"
    assert machine.settings()[1][1] == 350.0
    assert invoke(["unlock"]) == 0
    assert "nothing to restore" in capsys.readouterr().out
    assert told(tiny_plan(), BoardSettings()) == []


def test_a_run_of_another_container_may_live_and_is_restored_by_force_alone(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_behind(machine, namespace="pid:[1]")
    assert told(tiny_plan(), BoardSettings()) == []
    assert any("holds the same GPUs" in line for line in told(clocked(), LOCK))
    assert invoke(["unlock"]) == 0
    assert "another container" in capsys.readouterr().out
    assert machine.settings()[1][1] == 400.0
    assert invoke(["unlock", "--force"]) == 0
    assert machine.settings()[1][1] == 350.0


def test_unlock_that_may_not_fails_and_says_why(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    leave_behind(machine)
    boards = machine.boards()
    boards[1].refused = {"SetPowerManagementLimit": NO_PERMISSION}
    machine.set(*boards)
    assert invoke(["unlock", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {"lines": [], "failures": ["GPU 1: power limit not restored: Insufficient Permissions"]}


# Energy of a run


def reading(joules: float | None, source: str = "counter", scope: str = "gpu") -> Reading:
    if joules is None:
        return unknown("no counter here", 2.0, scope)
    return Reading(joules, "measured", source, scope, 2.0, 0.9 * joules, 1.1 * joules)


def window(gpu: Reading | None, host: Reading, device: str) -> Window:
    return Window(NodeReading(gpu, host), 10, 1, Quantity(0.02, "s", "measured", 0.019, 0.022), device)


def test_measured_gpus_and_hosts_are_measured() -> None:
    found = run_energy(tiny_plan(), window(reading(100.0), reading(50.0, scope="package"), H100))
    assert (found.total.value, found.total.label) == (15.0, "measured")
    assert {name: part.value for name, part in found.parts.items()} == {"GPUs": 10.0, "hosts": 5.0}


def test_hosts_without_a_counter_are_assumed_and_so_is_the_sum_but_gpus_stay_measured() -> None:
    found = run_energy(tiny_plan(), window(reading(100.0), reading(None), H100))
    assert found.parts["GPUs"].label == "measured"
    assert found.parts["hosts"].label == found.total.label == "assumed"
    assert found.parts["hosts"].value == pytest.approx(0.5 / 0.01 * 0.02)
    assert "GPUs 10 J measured + hosts 1 J assumed" in found.text
    assert any("no counter here" in note for note in found.notes)


def test_gpus_without_a_counter_are_modelled_at_the_measured_time() -> None:
    """Computing takes the joules that it takes; waiting draws power for as long as the step really took."""
    found = run_energy(tiny_plan(), window(reading(None), reading(50.0, scope="package"), H100))
    assert found.parts["GPUs"].label == found.total.label == "modelled"
    assert found.parts["GPUs"].value == pytest.approx(8.0 + 4.0 / 0.01 * 0.02)


def test_gpus_of_another_type_than_the_plan_s_are_assumed() -> None:
    found = run_energy(tiny_plan(), window(reading(None), reading(50.0), "NVIDIA L4"))
    assert found.parts["GPUs"].label == "assumed"
    assert any("which these are not" in note for note in found.notes)


def test_a_plan_for_gpus_that_runs_on_processors_is_assumed_and_never_zero() -> None:
    found = run_energy(tiny_plan(), window(None, reading(None), "cpu"))
    assert found.total.label == "assumed"
    assert found.total.low > 0
    assert set(found.parts) == {"CPUs"}


def test_a_plan_for_processors_is_modelled_by_its_own_figures() -> None:
    plan = tiny_plan()
    plan = replace(plan, cluster=replace(plan.cluster, gpu="cpu"))
    assert run_energy(plan, window(None, reading(None), "cpu")).total.label == "modelled"
    assert run_energy(plan, window(None, reading(20.0), "cpu")).total.value == 2.0
    nothing = replace(window(None, reading(None), "cpu"), reading=None)
    assert "no meter" in run_energy(plan, nothing).notes[0]


def test_integrated_power_is_named_as_the_source() -> None:
    found = run_energy(tiny_plan(), window(reading(100.0, "integrated"), reading(5.0), H100))
    assert found.notes[0].startswith("energy of GPUs: integrated, scope gpu, 2 s")
