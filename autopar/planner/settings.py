"""Settings of boards that a plan asks for while it runs: a clock per stage, a power limit; see `autopar.clocks`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopar.clocks.hold import Held, Wanted, hold
from autopar.clocks.restore import Restored, restore_stale
from autopar.clocks.state import read_states, state_directory
from autopar.errors import InputError
from autopar.ir.hosts import Hosts
from autopar.ir.plan import Plan
from autopar.meters import find_boards, visible_gpus
from autopar.nvml import Board, NvmlError, open_nvml
from autopar.planner.detect import kebab_name

RESTORE_COMMAND = "autopar unlock"


@dataclass(frozen=True, slots=True)
class BoardSettings:
    """What a run should set on its GPUs while it lasts.

    Attributes:
        lock_clocks: the clock of each GPU's stage.
        set_power_limit: the limit that the plan was made with.
        schedule: a file of `autopar clocks --out`; each GPU then takes the highest clock of its instructions.
    """

    lock_clocks: bool = False
    set_power_limit: bool = False
    schedule: str | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be set."""
        return not (self.lock_clocks or self.set_power_limit or self.schedule)


def check_settings(plan: Plan, settings: BoardSettings) -> None:
    """Raises InputError for settings that the plan cannot give."""
    if settings.set_power_limit and plan.cluster.gpu_power_limit_w is None:
        raise InputError("--set-power-limit: the plan has no power limit; make it with --gpu-power-limit, e.g. 300W")
    if settings.schedule is not None:
        _schedule_clocks(plan, settings.schedule)


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
        by_rank, count = _schedule_clocks(plan, settings.schedule)
        notes.append(
            f"the schedule has clocks for {count} instructions; a GPU is locked to one, the highest of its own, since "
            "a switch takes about as long as an instruction: steps are no later than planned, but save less"
        )
    elif settings.lock_clocks:
        by_rank = {place: stage.clock_hz / 1e6 for place, stage in enumerate(plan.decisions.stages)}
    limit_w = plan.cluster.gpu_power_limit_w if settings.set_power_limit else None
    places = [rank // plan.decisions.mesh.num_devices for rank in ranks]
    wanted = [
        Wanted(board.uuid, by_rank.get(place) or None, limit_w) for board, place in zip(boards, places, strict=True)
    ]
    free = sorted({place for place in places if by_rank and not by_rank.get(place)})
    if free:
        which = "all clocks" if len(free) == len(set(places)) else f"the clocks of stages {', '.join(map(str, free))}"
        notes.append(f"the plan leaves {which} alone (see --clocks of 'autopar plan')")
    return wanted, notes


def _planned_gpu(plan: Plan, rank: int) -> str:
    stage = plan.decisions.stages[rank // plan.decisions.mesh.num_devices]
    return stage.gpu or plan.cluster.gpu


def _schedule_clocks(plan: Plan, name: str) -> tuple[dict[int, float], int]:
    """Highest clock in MHz by pipeline rank, and the number of instructions. Raises InputError."""
    try:
        content: Any = json.loads(Path(name).read_text(encoding="utf-8"))
        found = [(int(own["stage"]), list(map(float, own["clocks_mhz"]))) for own in content["stages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--clock-schedule: {name} is no file of 'autopar clocks --out': {error}") from error
    highest: dict[int, float] = {}
    for place, clocks in found:
        highest[place] = max(highest.get(place, 0.0), *clocks)
    if sorted(highest) != list(range(plan.decisions.num_ranks)):
        raise InputError(
            f"--clock-schedule: {name} is for {len(highest)} stages, the plan has {plan.decisions.num_ranks}"
        )
    return highest, sum(len(clocks) for _, clocks in found)
