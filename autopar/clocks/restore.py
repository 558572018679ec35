"""Restoring what a run has set: used by the run at its end, by its guardian if it was killed, and by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopar.clocks.state import APPLICATION, LIMIT, LOCKED, SavedBoard, State, locked, read_states
from autopar.nvml import Board, Nvml, NvmlError, open_nvml


@dataclass(frozen=True)
class Restored:
    """What became of one state file.

    Attributes:
        lines: what was restored, board by board.
        failures: what could not be; the file then stays.
    """

    lines: tuple[str, ...]
    failures: tuple[str, ...] = ()


def restore(state: State, nvml: Nvml) -> Restored:
    """Undo everything that the state says was touched, and remove its file, unless something refuses."""
    lines: list[str] = []
    failures: list[str] = []
    left = []
    for saved in state.boards:
        still = saved
        for setting in saved.touched:
            try:
                lines.append(_undo(nvml.board_by_uuid(saved.uuid), saved, setting))
                still = still.without(setting)
            except NvmlError as error:
                failures.append(f"GPU {saved.index}: {setting} not restored: {error}")
        left.append(still)
    if failures:
        replace(state, boards=tuple(left)).write()
    else:
        state.path.unlink(missing_ok=True)
    return Restored(tuple(lines), tuple(failures))


def _undo(board: Board, saved: SavedBoard, setting: str) -> str:
    if setting == LOCKED:
        board.unlock_clock()
        return f"GPU {saved.index}: clock unlocked"
    if setting == APPLICATION and saved.application_mhz is not None:
        board.set_application_clocks(*saved.application_mhz)
        return f"GPU {saved.index}: application clock back to {saved.application_mhz[1]:g} MHz"
    if setting == LIMIT and saved.limit_w is not None:
        board.set_power_limit(saved.limit_w)
        return f"GPU {saved.index}: power limit back to {saved.limit_w:g} W"
    return f"GPU {saved.index}: {setting} had no earlier value"


def restore_stale(directory: Path, binding: Any = None, *, with_invisible: bool = False) -> Restored:
    """Restore after runs that are gone without having done it, and whose guardians are gone too.

    Args:
        with_invisible: also after those of other containers, of which it cannot be seen whether they live.

    Raises:
        InputError: the directory cannot be used, or holds a file that is none of ours.
    """
    with locked(directory):
        states = read_states(directory)
        void = [state for state in states if not state.is_of_this_boot]
        for state in void:
            state.path.unlink(missing_ok=True)
        lines = [f"process {state.owner}: nothing left of its settings since this machine was started anew"
                 for state in void]  # fmt: skip
        kept = [state for state in states if state.is_owned and (state.is_visible or not with_invisible)]
        lines += [_why_kept(state) for state in kept]
        stale = [state for state in states if state not in void and state not in kept]
        if not stale:
            return Restored(tuple(lines))
        try:
            with open_nvml(binding) as nvml:
                found = [restore(state, nvml) for state in stale]
        except NvmlError as error:
            return Restored(tuple(lines), (f"NVML cannot be opened: {error}",))
    return Restored(
        (*lines, *(line for one in found for line in one.lines)), tuple(text for one in found for text in one.failures)
    )


def _why_kept(state: State) -> str:
    if state.is_visible:
        return f"process {state.owner} still runs and restores by itself"
    return f"process {state.owner} is of another container, where it may still run; --force restores all the same"
