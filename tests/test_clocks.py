"""Clocks and power limits of pretended boards, held by real processes that end in every way there is."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autopar.clocks.guardian import start_guardian
from autopar.clocks.hold import Held, Wanted, hold
from autopar.clocks.restore import Restored, restore_stale
from autopar.clocks.state import read_states, started_at
from autopar.errors import InputError
from tests.machine import Machine, make_machine
from tests.nvml_double import NO_PERMISSION, FakeBoard

PATIENCE_S = 60.0
HOLDER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has children ignore
from autopar.clocks.hold import Wanted, hold
with hold([Wanted(0, 1080.0, 300.0), Wanted(1, 900.0)]) as held:
    print(held.clocks_mhz, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Two boards."""
    yield from make_machine(tmp_path, monkeypatch, FakeBoard(), FakeBoard())


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def held_once(*wanted: Wanted) -> tuple[Held, list[Restored]]:
    told: list[Restored] = []
    with hold(wanted, on_restored=told.append) as held:
        pass
    return held, told


def test_each_board_is_locked_to_its_own_clock_and_all_is_restored(machine: Machine) -> None:
    told: list[Restored] = []
    with hold([Wanted(0, 1080.0, 300.0), Wanted(1, 907.0)], on_restored=told.append) as held:
        assert machine.settings() == [(1080.0, 300.0, (1593, 1410)), (900.0, 400.0, (1593, 1410))]
        assert len(machine.files()) == 1
    assert held.clocks_mhz == {0: 1080.0, 1: 900.0}
    assert held.limits_w == {0: 300.0}
    assert "GPU 0 at 1080 MHz; GPU 1 at 900 MHz" in held.notes[0]
    assert not held.commands
    assert machine.is_clean()
    assert "GPU 0: power limit back to 400 W" in told[0].lines


def test_an_exception_restores(machine: Machine) -> None:
    with pytest.raises(ZeroDivisionError), hold([Wanted(0, 1080.0, 300.0)]):
        raise ZeroDivisionError
    assert machine.is_clean()


def test_a_limit_that_was_set_before_comes_back_not_the_default(machine: Machine) -> None:
    machine.set(FakeBoard(limit_w=350.0))
    with hold([Wanted(0, None, 200.0)]):
        assert machine.settings()[0][:2] == (None, 200.0)
    assert machine.settings()[0][:2] == (None, 350.0)
    assert "unlock" not in machine.boards()[0].log


def test_without_permission_the_run_goes_on_and_the_administrator_is_told_what_to_type(machine: Machine) -> None:
    refused = {"SetGpuLockedClocks": NO_PERMISSION, "SetPowerManagementLimit": NO_PERMISSION}
    machine.set(FakeBoard(refused=refused), FakeBoard(refused=refused))
    held, told = held_once(Wanted(0, 1080.0, 300.0), Wanted(1, 900.0, 300.0))
    assert (held.clocks_mhz, held.limits_w, told) == ({}, {}, [])
    assert "clocks are not locked (Insufficient Permissions)" in held.notes[0]
    assert "power limits are not set (Insufficient Permissions)" in held.notes[1]
    assert held.commands == (
        "sudo nvidia-smi -i 0 -lgc 1080,1080",
        "sudo nvidia-smi -i 1 -lgc 900,900",
        "sudo nvidia-smi -i 0,1 -rgc   # afterwards",
        "sudo nvidia-smi -i 0,1 -pl 300",
        "sudo nvidia-smi -i 0,1 -pl 400   # afterwards",
    )
    assert machine.is_clean()


def test_if_one_board_refuses_none_keeps_a_clock(machine: Machine) -> None:
    machine.set(FakeBoard(), FakeBoard(refused={"SetGpuLockedClocks": NO_PERMISSION}))
    with hold([Wanted(0, 1080.0), Wanted(1, 900.0)]) as held:
        assert machine.settings()[0][0] is None
    assert held.clocks_mhz == {}
    assert machine.boards()[0].log == ["lock 1080-1080", "unlock"]
    assert machine.is_clean()


def test_application_clocks_serve_where_an_administrator_opened_them(machine: Machine) -> None:
    refused = {"SetGpuLockedClocks": NO_PERMISSION}
    machine.set(*(FakeBoard(refused=refused, is_open_to_all=True, application_mhz=(1593, 1275)) for _ in range(2)))
    with hold([Wanted(0, 1080.0), Wanted(1, 900.0)]) as held:
        assert [board.application_mhz[1] for board in machine.boards()] == [1080, 900]
    assert "application clocks" in held.notes[0]
    assert held.clocks_mhz == {0: 1080.0, 1: 900.0}
    assert [tuple(board.application_mhz) for board in machine.boards()] == [(1593, 1275)] * 2
    assert not machine.files()


def test_a_limit_outside_the_board_s_range_is_refused_with_the_range(machine: Machine) -> None:
    held, _ = held_once(Wanted(0, None, 50.0))
    assert "from 100 to 400 W, not 50 W" in held.notes[0]


def test_a_divided_board_is_left_alone(machine: Machine) -> None:
    machine.set(FakeBoard(), FakeBoard(is_divided=True))
    held, _ = held_once(Wanted(0, 1080.0), Wanted(1, 1080.0))
    assert "MIG" in held.notes[0]
    assert machine.is_clean()


def test_without_a_driver_the_run_goes_on_and_says_so(machine: Machine) -> None:
    machine.set()
    held, _ = held_once(Wanted(0, 1080.0))
    assert "not applied: Not Found" in held.notes[0]


def test_boards_that_another_run_holds_are_left_to_it(machine: Machine) -> None:
    with hold([Wanted(0, 1080.0)]):
        with hold([Wanted(0, 600.0), Wanted(1, 600.0)]) as second:
            assert f"process {os.getpid()} holds the same GPUs" in second.notes[0]
        with hold([Wanted(1, 600.0)]) as third:
            assert third.clocks_mhz == {1: 600.0}
        assert machine.settings()[0][0] == 1080.0
    assert machine.is_clean()


def test_nothing_is_set_where_no_guardian_comes_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.clocks.hold.start_guardian", lambda _: None)
    held, _ = held_once(Wanted(0, 1080.0))
    assert "did not start" in held.notes[0]
    assert machine.boards()[0].log == []
    assert machine.is_clean()


def test_nothing_is_set_where_no_state_can_be_kept(machine: Machine) -> None:
    machine.states.write_text("in the way")
    held, _ = held_once(Wanted(0, 1080.0))
    assert "AUTOPAR_STATE" in held.notes[0]
    assert machine.boards()[0].log == []


def start_holder() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)


def wait_until_held(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "{0: 1080.0, 1: 900.0}\n"


def guardian_of(process: subprocess.Popen[str]) -> int:
    """The only child of the holder."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


def is_gone(pid: int) -> bool:
    return started_at(pid) == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_boards_are_restored_however_the_run_is_killed(machine: Machine, number: signal.Signals) -> None:
    process = start_holder()
    wait_until_held(process)
    guardian = guardian_of(process)
    assert machine.settings() == [(1080.0, 300.0, (1593, 1410)), (900.0, 400.0, (1593, 1410))]
    process.send_signal(number)
    process.wait()
    assert until(machine.is_clean)
    assert until(lambda: is_gone(guardian))


def test_ctrl_c_in_the_terminal_does_not_end_the_guardian_first(machine: Machine) -> None:
    """It stands in another session, and so in no process group of the terminal."""
    process = start_holder()
    wait_until_held(process)
    guardian = guardian_of(process)
    assert os.getsid(guardian) == guardian != os.getsid(process.pid)
    os.kill(guardian, signal.SIGINT)
    time.sleep(0.2)
    assert not is_gone(guardian)
    process.kill()
    process.wait()
    assert until(machine.is_clean)


def test_a_guardian_that_is_told_to_end_restores_first(machine: Machine) -> None:
    """The machine goes down: every process gets SIGTERM."""
    process = start_holder()
    wait_until_held(process)
    os.kill(guardian_of(process), signal.SIGTERM)
    assert until(machine.is_clean)
    process.kill()
    process.wait()


def test_without_its_guardian_the_run_restores_by_itself(machine: Machine) -> None:
    process = start_holder()
    wait_until_held(process)
    os.kill(guardian_of(process), signal.SIGKILL)
    process.send_signal(signal.SIGINT)
    process.wait()
    assert machine.is_clean()


def kill_both(process: subprocess.Popen[str]) -> None:
    wait_until_held(process)
    os.kill(guardian_of(process), signal.SIGKILL)
    process.kill()
    process.wait()


def test_killed_together_they_leave_a_file_from_which_boards_are_restored(machine: Machine) -> None:
    process = start_holder()
    kill_both(process)
    assert machine.settings()[0] == (1080.0, 300.0, (1593, 1410))
    found = restore_stale(machine.states)
    assert found.failures == ()
    assert "GPU 1: clock unlocked" in found.lines
    assert machine.is_clean()
    assert restore_stale(machine.states) == Restored(())


def test_what_cannot_be_restored_stays_on_file_and_is_told(machine: Machine) -> None:
    kill_both(start_holder())
    boards = machine.boards()
    boards[1].refused = {"ResetGpuLockedClocks": NO_PERMISSION}
    machine.set(*boards)
    found = restore_stale(machine.states)
    assert found.failures == ("GPU 1: locked clock not restored: Insufficient Permissions",)
    (state,) = read_states(machine.states)
    assert [board.touched for board in state.boards] == [(), ("locked clock",)]
    boards = machine.boards()
    boards[1].refused = {}
    machine.set(*boards)
    assert restore_stale(machine.states).failures == ()
    assert machine.is_clean()


def test_the_next_run_restores_first_and_does_not_take_leftovers_for_what_was_there(machine: Machine) -> None:
    kill_both(start_holder())
    with hold([Wanted(0, 600.0, 200.0)]) as held:
        assert "had left were restored first" in held.notes[0]
        assert machine.settings()[1][0] is None
    assert machine.is_clean()


def test_a_run_that_still_lives_is_not_restored_by_hand(machine: Machine) -> None:
    with hold([Wanted(0, 1080.0)]):
        found = restore_stale(machine.states)
        assert "still runs" in found.lines[0]
        assert machine.settings()[0][0] == 1080.0


def test_a_file_from_before_a_reboot_says_nothing_about_now(machine: Machine) -> None:
    kill_both(start_holder())
    (path,) = machine.states.glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another"}))
    before = machine.boards()
    assert "started anew" in restore_stale(machine.states).lines[0]
    assert machine.boards() == before
    assert not machine.files()


@pytest.mark.parametrize("text", ["{", "[]", '{"boot": "x"}', '{"boot":"","owner":1,"owner_started":"","boards":[{}]}'])
def test_a_file_that_is_none_of_ours_is_named_and_left(machine: Machine, text: str) -> None:
    machine.states.mkdir()
    path = machine.states / "strange.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"strange\.json"):
        restore_stale(machine.states)
    assert path.exists()
    held, _ = held_once(Wanted(0, 1080.0))
    assert "strange.json" in held.notes[0]


def test_a_guardian_without_nvml_does_not_come_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", str(machine.file.parent / "none"))
    assert start_guardian(machine.states / "x.json") is None


def test_kills_at_any_moment_leave_nothing_behind(machine: Machine) -> None:
    """The run is killed between 0 and 0.5 s after its start: before, during and after the settings are made."""
    chance = random.Random(7)
    for _ in range(8):
        process = start_holder()
        time.sleep(0.5 * chance.random())
        process.kill()
        process.wait()
        assert until(lambda: bool(restore_stale(machine.states)) and machine.is_clean())
    assert machine.is_clean()
