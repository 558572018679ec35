"""Settings of boards that a plan asks for while it runs: a clock per stage, a power limit; see `autopar.clocks`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.clocks.hold import Held, Wanted, hold
from autopar.clocks.restore import Restored, restore_stale
from autopar.clocks.state import read_states, state_directory
from autopar.errors import InputError
from autopar.ir.hosts import Hosts
from autopar.ir.plan import Plan
from autopar.meters import find_boards, visible_gpus
from autopar.nvml import Board, NvmlError, open_nvml
from autopar.planner.clock_file import SWITCH_S, ClockSchedule, read_schedule, switching
from autopar.planner.detect import kebab_name
from autopar.units import format_seconds

RESTORE_COMMAND = "autopar unlock"


@dataclass(frozen=True, slots=True)
class BoardSettings:
    """What a run should set on its GPUs while it lasts.

    Attributes:
        lock_clocks: the clock of each GPU's stage.
        set_power_limit: the limit that the plan was made with.
        schedule: a file of `autopar clocks --out`, see `planner.clock_file`.
        switch_s: how long a GPU takes to reach another clock.
    """

    lock_clocks: bool = False
    set_power_limit: bool = False
    schedule: str | None = None
    switch_s: float = SWITCH_S

    def for_another_plan(self) -> BoardSettings:
        """What a plan made after a failure keeps: a schedule is of one plan, clocks of stages are of any."""
        return replace(self, schedule=None, lock_clocks=self.lock_clocks or self.schedule is not None)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be set."""
        return not (self.lock_clocks or self.set_power_limit or self.schedule)


def check_settings(plan: Plan, settings: BoardSettings) -> None:
    """Raises InputError for settings that the plan cannot give."""
    if settings.set_power_limit and plan.cluster.gpu_power_limit_w is None:
        raise InputError("--set-power-limit: the plan has no power limit; make it with --gpu-power-limit, e.g. 300W")
    if settings.schedule is not None:
        read_schedule(plan, settings.schedule)


@contextlib.contextmanager
def held_boards(
    plan: Plan,
    settings: BoardSettings,
    ranks: range,
    say: Callable[[str], None] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Held]:
    """Hold the boards of this node's ranks while the block runs; what is held and restored is said at once.

    Args:
        ranks: of this node, whose GPUs CUDA counts in the same order; none: another process sees to it.

    Raises:
        InputError: the plan has no such settings.
    """
    tell = say or (lambda _: None)

    def tell_restored(found: Restored) -> None:
        for line in (*found.lines, *(f"{failure}; try {RESTORE_COMMAND}" for failure in found.failures)):
            tell(line)

    if not settings.is_idle:
        check_settings(plan, settings)
    wanted, notes = ([], _left_over()) if settings.is_idle else _wanted(plan, settings, ranks, environment)
    if not any(one.clock_mhz or one.limit_w for one in wanted) or not ranks:
        held = Held({}, {}, tuple(notes) if ranks else ())
        _say_all(held, tell)
        yield held
        return
    with hold(wanted, on_restored=tell_restored) as found:
        held = replace(found, notes=(*notes, *found.notes))
        _say_all(held, tell)
        yield held


def _say_all(held: Held, tell: Callable[[str], None]) -> None:
    for line in (*held.notes, *(["an administrator may do it:"] if held.commands else []), *held.commands):
        tell(line)


def node_ranks(num_processes: int, hosts: Hosts, environment: Mapping[str, str] = os.environ) -> range:
    """Ranks of this node, if this process is the one to see to their boards; else none."""
    if "RANK" not in environment:
        return hosts.local_ranks(num_processes)
    if environment.get("LOCAL_RANK", "0") != "0":
        return range(0)
    first, count = int(environment["RANK"]), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    return range(first, first + count)


def restore_boards(*, with_invisible: bool = False) -> Restored:
    """Restore what runs left behind that died together with their guardians; see `restore_stale`."""
    return restore_stale(state_directory(), with_invisible=with_invisible)


def _left_over() -> list[str]:
    """A warning if a dead run has left its settings on boards."""
    try:
        stale = [state for state in read_states(state_directory()) if state.is_of_this_boot and not state.is_owned]
    except InputError:
        return []
    return [f"a run that died may have left clocks or limits on GPUs: {RESTORE_COMMAND}"] if stale else []


def _wanted(
    plan: Plan, settings: BoardSettings, ranks: range, environment: Mapping[str, str]
) -> tuple[list[Wanted], list[str]]:
    """Settings by board, or none and the reason."""
    try:
        with open_nvml() as nvml:
            count = len(nvml.boards())
            visible = [one for one in visible_gpus(environment, len(ranks)) if isinstance(one, str) or one < count]
            boards = [] if len(visible) < len(ranks) else find_boards(nvml, visible)
            names = [kebab_name(board.name) or board.name for board in boards]
            if not boards or len({board.uuid for board in boards}) < len(ranks):
                return [], [
                    "clocks and limits are not applied: this node's ranks have no GPU each, so none runs on one"
                ]
            is_ambiguous = len(set(names)) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    except NvmlError as error:
        return [], [f"clocks and limits are not applied: {error}"]
    if is_ambiguous and "GPU-" not in environment.get("CUDA_VISIBLE_DEVICES", ""):
        order = "CUDA may count them in another order than NVML; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        return [], [f"clocks and limits are not applied: GPUs differ, and {order}"]
    for rank, name in zip(ranks, names, strict=True):
        planned = _planned_gpu(plan, rank)
        if planned != name:
            return [], [f"clocks and limits are not applied: the plan is for {planned}, rank {rank} runs on {name}"]
    return _of_boards(plan, settings, ranks, boards)


def _of_boards(
    plan: Plan, settings: BoardSettings, ranks: range, boards: list[Board]
) -> tuple[list[Wanted], list[str]]:
    notes = []
    by_rank: Mapping[int, float] = {}
    if settings.schedule is not None:
        schedule = read_schedule(plan, settings.schedule)
        by_rank = schedule.highest_mhz()
        notes.append(_schedule_words(schedule, settings.switch_s))
    elif settings.lock_clocks:
        by_rank = {place: stage.clock_hz / 1e6 for place, stage in enumerate(plan.decisions.stages)}
    limit_w = plan.cluster.gpu_power_limit_w if settings.set_power_limit else None
    places = [plan.decisions.place_of(rank)[0] for rank in ranks]
    wanted = [
        Wanted(board.uuid, by_rank.get(place) or None, limit_w) for board, place in zip(boards, places, strict=True)
    ]
    free = sorted({place for place in places if by_rank and not by_rank.get(place)})
    if free:
        which = "all clocks" if len(free) == len(set(places)) else f"the clocks of stages {', '.join(map(str, free))}"
        notes.append(f"the plan leaves {which} alone (see --clocks of 'autopar plan')")
    return wanted, notes


def _planned_gpu(plan: Plan, rank: int) -> str:
    stage = plan.decisions.stages[plan.decisions.place_of(rank)[0]]
    return stage.gpu or plan.cluster.gpu


def _schedule_words(schedule: ClockSchedule, switch_s: float) -> str:
    count = len(schedule.clocks_mhz)
    if schedule.has_halves:
        return (
            f"the schedule has clocks for {count} instructions, halves of backward among them: a GPU is locked to one "
            "clock, the highest of its own; steps are no later than planned, but save less"
        )
    takes = f"a change of clock takes {format_seconds(switch_s)} (assumed)"
    shortest = f"the shortest of {count} instructions takes {format_seconds(schedule.shortest_s)}"
    if is_switched(schedule, switch_s):
        return f"{shortest} and {takes}: each GPU changes its clock between instructions"
    return (
        f"{shortest} and {takes}, too long against it: a GPU is locked to one clock, the highest of its own "
        "instructions; steps are no later than planned, but save less"
    )


def switching_of(
    plan: Plan, settings: BoardSettings, held: Held, ranks: range, environment: Mapping[str, str] = os.environ
) -> dict[str, Any] | None:
    """What this node's ranks need to change clocks between instructions, as JSON; None: they do not."""
    if settings.schedule is None or not held.state_file:
        return None
    schedule = read_schedule(plan, settings.schedule)
    if not is_switched(schedule, settings.switch_s, environment):
        return None
    with open_nvml() as nvml:
        boards = find_boards(nvml, visible_gpus(environment, len(ranks)))
    uuids = {rank: board.uuid for rank, board in zip(ranks, boards, strict=True)}
    return switching(schedule, held, uuids, plan.decisions)


def is_switched(schedule: ClockSchedule, switch_s: float, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this node's ranks change clocks: under torchrun each is a process of its own, which holds nothing."""
    return schedule.is_switched(switch_s) and "RANK" not in environment
