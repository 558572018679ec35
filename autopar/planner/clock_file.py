"""Clock schedules: files of `autopar clocks --out`, and how a run follows them.

A run locks each GPU to the highest clock of its instructions at first. Where instructions are long against a change of
clock, each rank then changes its own clock before every instruction that wants another (`runtime.clock_switch`); where
they are not, that one clock stays: steps are no later than planned, but save less. The GPUs are held meanwhile
(`clocks.hold`), so that a guardian unlocks them whatever becomes of the run; a rank changes a clock under the lock of
the guardian, and none after the guardian has begun to restore.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.clocks.hold import Held, nearest_mhz
from autopar.clocks.state import locked
from autopar.errors import InputError
from autopar.ir.clocks import ClockedStep
from autopar.ir.pipeline import splits_backward
from autopar.ir.plan import Plan
from autopar.ir.serialize import plan_json
from autopar.ir.solution import Decisions
from autopar.ir.timeline import BACKWARD, FORWARD, WEIGHT
from autopar.nvml import Board, NvmlError, open_nvml
from autopar.report.clocks import clocks_json
from autopar.search.clocks import work_name

if TYPE_CHECKING:
    from autopar.runtime.executor import Executor

SWITCH_S = 0.02
"""How long a GPU takes to reach another clock. An assumption: arXiv 2502.20075 measured milliseconds to tens of them,
by GPU and target clock."""
WORTH = 10
"""An instruction must last so many times as long for a clock of its own."""


@dataclass(frozen=True)
class ClockSchedule:
    """Clocks of all instructions of a plan's step: MHz by pipeline rank, work (`F`, `B.1`) and microbatch."""

    clocks_mhz: Mapping[tuple[int, str, int], float]
    shortest_s: float

    def highest_mhz(self) -> dict[int, float]:
        """By pipeline rank."""
        found: dict[int, float] = {}
        for (rank, _, _), mhz in self.clocks_mhz.items():
            found[rank] = max(found.get(rank, 0.0), mhz)
        return found

    @property
    def has_halves(self) -> bool:
        """Whether a backward is two instructions, between which a rank cannot tell when to change its clock."""
        return any(work.startswith(WEIGHT) for _, work, _ in self.clocks_mhz)

    def is_switched(self, switch_s: float) -> bool:
        """Whether instructions get clocks of their own: they must be whole and long enough."""
        return not self.has_halves and self.shortest_s >= WORTH * switch_s

    def of_rank(self, rank: int) -> list[tuple[str, int, float]]:
        """(work, microbatch, MHz) of a pipeline rank."""
        return [(work, m, mhz) for (place, work, m), mhz in sorted(self.clocks_mhz.items()) if place == rank]


def schedule_json(plan: Plan, found: ClockedStep) -> dict[str, Any]:
    """What `autopar clocks --out` writes."""
    return clocks_json(found) | {"plan": _decisions_digest(plan)}


def _decisions_digest(plan: Plan) -> str:
    content = plan_json(plan)
    return hashlib.sha256(json.dumps(content["decisions"], sort_keys=True).encode()).hexdigest()


def read_schedule(plan: Plan, name: str) -> ClockSchedule:
    """Raises InputError for a file that is no schedule of this plan."""
    try:
        content: Any = json.loads(Path(name).read_text(encoding="utf-8"))
        made_for = str(content.get("plan", ""))
        clocks = {
            (int(own["stage"]), str(own["kind"]), int(microbatch)): float(mhz)
            for own in content["stages"]
            for microbatch, mhz in zip(own["microbatches"], own["clocks_mhz"], strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--clock-schedule: {name} is no file of 'autopar clocks --out': {error}") from error
    _check(plan, name, clocks, made_for)
    stages = plan.predicted.stages
    return ClockSchedule(
        clocks, min(figure.value for stage in stages for figure in (stage.forward_s, stage.backward_s))
    )


def _check(plan: Plan, name: str, clocks: Mapping[tuple[int, str, int], float], made_for: str) -> None:
    decisions = plan.decisions
    works = (
        (FORWARD, BACKWARD, WEIGHT) if splits_backward(decisions.schedule, decisions.num_ranks) else (FORWARD, BACKWARD)
    )
    expected = {
        (rank, work_name(work, chunk), microbatch)
        for rank in range(decisions.num_ranks)
        for work in works
        for chunk in range(decisions.interleave)
        for microbatch in range(decisions.num_microbatches)
    }
    again = "make it again with 'autopar clocks'"
    if clocks.keys() != expected:
        rank, work, microbatch = min(clocks.keys() ^ expected)
        which = "lacks" if (rank, work, microbatch) in expected else "has, and the plan has not,"
        raise InputError(f"--clock-schedule: {name} {which} {work} of microbatch {microbatch} on rank {rank}; {again}")
    if made_for and made_for != _decisions_digest(plan):
        raise InputError(f"--clock-schedule: {name} was made for another plan; {again}")
    wrong = [mhz for mhz in clocks.values() if not 0 < mhz < math.inf]
    if wrong:
        raise InputError(f"--clock-schedule: {name} has a clock of {wrong[0]:g} MHz; {again}")


def switching(
    schedule: ClockSchedule | None, held: Held, boards: Mapping[int, str], decisions: Decisions
) -> dict[str, Any] | None:
    """What this node's ranks need to change their own clocks, as JSON; None: they do not.

    Args:
        schedule: to follow; None: clocks stay.
        held: boards, whose clocks must be locked.
        boards: identifiers, by rank.
    """
    if schedule is None or not held.state_file:
        return None
    ranks = {
        str(rank): {"board": uuid, "clocks": schedule.of_rank(decisions.place_of(rank)[0])}
        for rank, uuid in boards.items()
    }
    return {"state": held.state_file, "ranks": ranks}


@contextlib.contextmanager
def switched_clocks(executor: Executor, told: Mapping[str, Any] | None, notes: list[str]) -> Iterator[None]:
    """Change this rank's clock before its instructions while the block runs; `notes` is told what came of it.

    Args:
        told: of `switching`.
    """
    rank = os.environ.get("RANK", "0")
    own = None if told is None else told["ranks"].get(rank)
    if own is None or told is None:
        yield
        return
    from autopar.runtime.clock_switch import ClockSwitch

    state, clocks = Path(told["state"]), {(*_chunk(work), int(m)): float(mhz) for work, m, mhz in own["clocks"]}
    with contextlib.ExitStack() as stack:
        try:
            board = stack.enter_context(open_nvml()).board_by_uuid(own["board"])
        except NvmlError as error:
            notes.append(f"clocks were not changed between instructions: {error}")
            yield
            return
        wishes = {key: nearest_mhz(board, mhz) for key, mhz in clocks.items()}
        set_clock = _setter(board, state, os.getppid())
        switch = ClockSwitch(executor.runners, executor.optimizer, wishes, set_clock, executor.options.device)
        with switch:
            yield
    end = "; then a change was refused, and the last clock stayed" if switch.is_refused else ""
    notes.append(f"rank {rank} changed its clock {switch.num_changes} times between instructions{end}")


def _setter(board: Board, state: Path, owner: int) -> Callable[[float], bool]:
    """Locks the board's clock as long as the run lives and its state is there."""

    def set_clock(mhz: float) -> bool:
        with locked(state.parent):
            if not state.exists() or os.getppid() != owner:
                return False
            try:
                board.lock_clock(mhz)
            except NvmlError:
                return False
        return True

    return set_clock


def _chunk(work: str) -> tuple[int, str]:
    """`B.1` to (1, `B`)."""
    kind, _, chunk = work.partition(".")
    return int(chunk or 0), kind
