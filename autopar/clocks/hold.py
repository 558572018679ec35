"""Holding boards at clocks and power limits while a run lasts, and restoring them whatever happens to it.

All or nothing: if one board refuses a clock, none keeps one, since the stages of a plan are balanced together; limits
likewise. What was not applied is said with its reason and with the command lines of an administrator who may.

A kill -9 of the run is met by its guardian; of both, by the state file (`autopar unlock`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopar.clocks.guardian import end_guardian, start_guardian
from autopar.clocks.restore import Restored, restore
from autopar.clocks.state import (
    APPLICATION,
    LIMIT,
    LOCKED,
    SavedBoard,
    State,
    locked,
    new_state,
    read_states,
    state_directory,
)
from autopar.errors import InputError
from autopar.nvml import Board, Nvml, NvmlError, open_nvml


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one board should be held at; None leaves a setting alone. `board`: NVML index or identifier."""

    board: int | str
    clock_mhz: float | None = None
    limit_w: float | None = None


@dataclass(frozen=True)
class Held:
    """What boards are held at, and what not.

    Attributes:
        clocks_mhz, limits_w: by NVML index, as set.
        notes: sentences for the reader: what is held, what is not and why.
        commands: an administrator's command lines for what is not, and those that undo them.
        state_file: of the run, if clocks are locked: as long as it is there, they may be changed; else "".
    """

    clocks_mhz: dict[int, float]
    limits_w: dict[int, float]
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    state_file: str = ""


@contextlib.contextmanager
def hold(
    wanted: Sequence[Wanted],
    *,
    directory: Path | None = None,
    binding: Any = None,
    on_restored: Callable[[Restored], None] = lambda _: None,
) -> Iterator[Held]:
    """Hold boards while the block runs.

    Args:
        directory: of state files; the user's own if None.
        binding: stands for `pynvml` in this process; the guardian always imports it.
        on_restored: told at the end what was restored.
    """
    directory = state_directory() if directory is None else directory
    with contextlib.ExitStack() as stack:
        try:
            nvml = stack.enter_context(open_nvml(binding))
            boards = [(_find(nvml, one), one) for one in wanted]
        except NvmlError as error:
            yield _nothing([f"clocks and limits are not applied: {error}"])
            return
        holder = _Holder(nvml, boards, directory)
        try:
            yield holder.begin()
        finally:
            found = holder.end()
            if found is not None:
                on_restored(found)


def _find(nvml: Nvml, wanted: Wanted) -> Board:
    return nvml.board(wanted.board) if isinstance(wanted.board, int) else nvml.board_by_uuid(wanted.board)


def _nothing(notes: Sequence[str]) -> Held:
    return Held({}, {}, tuple(notes))


class _Holder:
    """One run's settings, from their state file to their end."""

    def __init__(self, nvml: Nvml, boards: list[tuple[Board, Wanted]], directory: Path) -> None:
        self._nvml = nvml
        self._boards = boards
        self._directory = directory
        self._state: State | None = None
        self._guardian: Any = None
        self._notes: list[str] = []
        self._commands: list[str] = []

    def begin(self) -> Held:
        """Apply what can be applied."""
        try:
            with locked(self._directory):
                obstacle = self._obstacle()
                if obstacle:
                    return _nothing([f"clocks and limits are not applied: {obstacle}"])
                self._state = new_state(self._directory, tuple(_saved(board) for board, _ in self._boards))
                self._state.write()
        except InputError as error:
            return _nothing([f"clocks and limits are not applied: {error}"])
        self._guardian = start_guardian(self._state.path)
        if self._guardian is None:
            self._notes.append("clocks and limits are not applied: the process that would restore them did not start")
            return self._held({}, {})
        clocks = self._apply_clocks()
        return self._held(clocks, self._apply_limits())

    def end(self) -> Restored | None:
        """Restore everything; None if nothing was touched."""
        if self._state is None:
            return None
        was_touched = any(board.touched for board in self._state.boards)
        try:
            found = restore(self._state, self._nvml)
        finally:
            if self._guardian is not None:
                end_guardian(self._guardian)
        if found.failures and not self._state.path.exists():
            found = Restored((*found.lines, "the guardian restored the rest"))
        return found if was_touched else None

    def _held(self, clocks: dict[int, float], limits: dict[int, float]) -> Held:
        is_locked = any(LOCKED in board.touched for board in self._saved_boards())
        state_file = str(self._state.path) if self._state is not None and clocks and is_locked else ""
        return Held(clocks, limits, tuple(self._notes), tuple(self._commands), state_file)

    def _obstacle(self) -> str:
        """Why nothing may be set; "" if it may.

        Settings that dead runs left are restored first, or they would count as what was there before.
        """
        uuids = {board.uuid for board, _ in self._boards}
        for state in read_states(self._directory):
            if not uuids & {board.uuid for board in state.boards}:
                continue
            if state.is_owned:
                return f"process {state.owner} holds the same GPUs"
            if not state.is_of_this_boot:
                state.path.unlink(missing_ok=True)
                continue
            left = restore(state, self._nvml)
            if left.failures:
                return f"settings of an earlier run could not be restored ({left.failures[0]})"
            self._notes.append(f"settings that process {state.owner} had left were restored first")
        for board, _ in self._boards:
            if board.is_divided():
                return f"GPU {board.index} is divided by MIG, and its clocks belong to all instances"
        return ""

    def _apply_clocks(self) -> dict[int, float]:
        todo = [(board, one.clock_mhz) for board, one in self._boards if one.clock_mhz is not None]
        if not todo:
            return {}
        target = {board.index: nearest_mhz(board, mhz) for board, mhz in todo}
        refusal = self._try_all([board for board, _ in todo], LOCKED, lambda b: b.lock_clock(target[b.index]))
        if refusal is None:
            self._notes.append(f"clocks locked: {_by_value(target, 'MHz')}")
            return target
        open_to_all = [board for board, _ in todo if board.may_set_application_clock()]
        if len(open_to_all) == len(todo):
            memory = {b.uuid: b.application_mhz[0] for b in self._saved_boards() if b.application_mhz is not None}
            second = self._try_all(
                open_to_all, APPLICATION, lambda b: b.set_application_clocks(memory[b.uuid], target[b.index])
            )
            if second is None:
                told = f"application clocks set, as locking is refused ({refusal}): {_by_value(target, 'MHz')}"
                self._notes.append(f"{told}; GPUs run at most at these")
                return target
        self._notes.append(f"clocks are not locked ({refusal}): the GPUs choose their own")
        self._commands += [f"sudo nvidia-smi -i {indices} -lgc {mhz:g},{mhz:g}" for mhz, indices in _groups(target)]
        self._commands.append(f"sudo nvidia-smi -i {_list(target)} -rgc   # afterwards")
        return {}

    def _apply_limits(self) -> dict[int, float]:
        target = {board.index: one.limit_w for board, one in self._boards if one.limit_w is not None}
        if not target:
            return {}
        boards = [board for board, one in self._boards if one.limit_w is not None]
        refusal = self._try_all(boards, LIMIT, lambda board: _set_limit(board, target[board.index]))
        if refusal is None:
            self._notes.append(f"power limits set: {_by_value(target, 'W')}")
            return target
        self._notes.append(f"power limits are not set ({refusal})")
        self._commands += [f"sudo nvidia-smi -i {indices} -pl {watts:g}" for watts, indices in _groups(target)]
        before = {board.index: board.limit_w for board in self._saved_boards() if board.limit_w is not None}
        back = {index: watts for index, watts in before.items() if index in target}
        self._commands += [
            f"sudo nvidia-smi -i {indices} -pl {watts:g}   # afterwards" for watts, indices in _groups(back)
        ]
        return {}

    def _try_all(self, boards: Sequence[Board], setting: str, apply: Callable[[Board], None]) -> NvmlError | None:
        """Set a setting on all boards or, if one refuses, on none; returns the refusal."""
        done: list[Board] = []
        for board in boards:
            self._touch(board, lambda saved: saved.with_touched(setting))
            try:
                apply(board)
            except NvmlError as error:
                self._touch(board, lambda saved: saved.without(setting))
                for other in done:
                    self._take_back(other, setting)
                return error
            done.append(board)
        return None

    def _take_back(self, board: Board, setting: str) -> None:
        """Undo one setting now; if even that is refused, it stays on the list of what the end restores."""
        saved = next(one for one in self._saved_boards() if one.uuid == board.uuid)
        try:
            if setting == LOCKED:
                board.unlock_clock()
            elif setting == APPLICATION and saved.application_mhz is not None:
                board.set_application_clocks(*saved.application_mhz)
            elif saved.limit_w is not None:
                board.set_power_limit(saved.limit_w)
        except NvmlError as error:
            self._notes.append(f"GPU {board.index}: {setting} could not be taken back at once: {error}")
            return
        self._touch(board, lambda one: one.without(setting))

    def _saved_boards(self) -> tuple[SavedBoard, ...]:
        return () if self._state is None else self._state.boards

    def _touch(self, board: Board, change: Callable[[SavedBoard], SavedBoard]) -> None:
        if self._state is not None:
            boards = tuple(change(one) if one.uuid == board.uuid else one for one in self._state.boards)
            self._state = replace(self._state, boards=boards)
            self._state.write()


def _saved(board: Board) -> SavedBoard:
    """What a board is at now, as far as it tells."""
    try:
        clocks: tuple[float, float] | None = board.application_clocks_mhz()
    except NvmlError:
        clocks = None
    try:
        limit_w: float | None = board.power_limit_w()
    except NvmlError:
        limit_w = None
    return SavedBoard(board.uuid, board.index, clocks, limit_w)


def nearest_mhz(board: Board, mhz: float) -> float:
    """The nearest clock that the board supports; the wish itself where the board does not tell."""
    try:
        supported = board.supported_clocks_mhz()
    except NvmlError:
        return mhz
    return min(supported, key=lambda clock: (abs(clock - mhz), -clock), default=mhz)


def _set_limit(board: Board, watts: float) -> None:
    """Raises NvmlError, also for a limit outside the board's range, which NVML would not explain."""
    least, highest = board.power_range_w()
    if not least <= watts <= highest:
        raise NvmlError("other", f"GPU {board.index} takes limits from {least:g} to {highest:g} W, not {watts:g} W")
    board.set_power_limit(watts)


def _groups(values: dict[int, float]) -> list[tuple[float, str]]:
    """Values with the indices that have them, highest first."""
    distinct = sorted(set(values.values()), reverse=True)
    return [(value, ",".join(str(i) for i in sorted(values) if values[i] == value)) for value in distinct]


def _list(values: dict[int, float]) -> str:
    return ",".join(map(str, sorted(values)))


def _by_value(values: dict[int, float], unit: str) -> str:
    return "; ".join(f"GPU {indices} at {value:g} {unit}" for value, indices in _groups(values))
