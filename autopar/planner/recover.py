"""A run that survives its workers: after a failure it goes on from the last checkpoint, on the devices that are left.

`run_surviving` starts the run, and again after each failure that another start may get over (a worker was killed, hung,
lost its device or its peers). If fewer devices are left, the model is planned again for them, under the same request:
objective, limits, batch and software stay, and so does the number of microbatches where a plan with it exists, since
batch norms and dropout depend on it. A failure that repeats without a new checkpoint in between ends the run.

Under torchrun it is torchrun that restarts; `plan_for_world` then plans for as many processes as it started.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from autopar.errors import InfeasibleError, InputError, WorkerError
from autopar.ir.hosts import Hosts
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.ir.serialize import parse_plan
from autopar.ir.solution import Pins
from autopar.planner.choose import describe
from autopar.planner.detect import detect_gpus
from autopar.planner.execute import RunReport, run_plan
from autopar.planner.recall import Command, finished_plan
from autopar.planner.rival import check_unchanged, request_of
from autopar.planner.settings import BoardSettings

REPLAN_LIMIT_S = 60.0
"""Of a search after a failure: devices wait for it."""
Say = Callable[[str], None]
CountDevices = Callable[[Plan], int]
"""How many devices could run the plan's model now; called after a failure."""


@dataclass(frozen=True)
class Policy:
    """When a run goes on after a failure.

    Attributes:
        max_failures: in a row, without a new checkpoint between them; one more ends the run.
        patience: failures in a row on the same devices, after which one of them is left behind.
    """

    max_failures: int = 4
    patience: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises InputError."""
        if self.max_failures < 0 or self.patience < 1:
            raise InputError("--max-failures must be at least 0, and the patience at least 1")


@dataclass(frozen=True)
class Restart:
    """One failure that was got over.

    Attributes:
        cause: its message, the first line.
        step: of the checkpoint that was taken up; 0: none.
        num_gpus: processes before and after.
    """

    cause: str
    step: int
    num_gpus: tuple[int, int]


@dataclass(frozen=True)
class Survived:
    """A run that came to its end.

    Attributes:
        report: of its last part.
        plan: that it ended with.
        restarts: in order.
    """

    report: RunReport
    plan: Plan
    restarts: tuple[Restart, ...]

    def __str__(self) -> str:
        lines = [
            f"  restarted  at step {r.step}, {r.num_gpus[0]} -> {r.num_gpus[1]} processes: {r.cause}"
            for r in self.restarts
        ]
        return "\n".join([str(self.report), *lines])


def run_surviving(
    plan: Plan,
    settings: RunSettings,
    *,
    policy: Policy | None = None,
    boards: BoardSettings | None = None,
    hosts: Hosts | None = None,
    progress: Say | None = None,
    count_devices: CountDevices | None = None,
) -> Survived:
    """Run the plan to its last step, whatever happens to its workers; without a directory of checkpoints, once.

    Args:
        policy: see `Policy`.
        count_devices: see `CountDevices`; None: as many as the driver lists, on the CPU as many as the plan uses.
        plan, settings, boards, hosts, progress: as for `run_plan`.

    Raises:
        WorkerError, NetworkError: the failure that ended the run.
        InputError, PlanMismatchError, InfeasibleError: nothing to do, or no plan for what is left.
    """
    policy, say, count = policy or Policy(), progress or _silent, count_devices or devices_here
    state = _State(plan, _visible_devices(), policy)
    restarts: list[Restart] = []
    while True:
        try:
            report = run_plan(
                state.plan,
                settings,
                boards=boards,
                hosts=hosts,
                progress=progress,
                environment=state.environment,
            )
        except WorkerError as error:
            if not settings.checkpoints or not error.is_lost:
                raise
            before = state.plan.decisions.num_gpus
            step = _step_of(settings)
            state = state.after(error, step)
            if hosts is None or hosts.num_nodes == 1:
                state = state.on(min(count(plan), plan.decisions.num_gpus - state.num_given_up), say)
            after = state.plan.decisions.num_gpus
            restarts.append(Restart(_first_line(error), step, (before, after)))
            say(f"{_first_line(error)}; going on from step {step} with {_words(after)}")
            continue
        return Survived(report, state.plan, tuple(restarts))


@dataclass(frozen=True)
class _State:
    """What a restart depends on.

    Attributes:
        plan: that runs.
        devices: that CUDA sees, by its names; () where it is left to itself.
        step: of the last checkpoint.
        in_a_row: failures since it.
        here: of those, on the devices that are used now.
        num_given_up: devices that were left behind.
    """

    plan: Plan
    devices: tuple[str, ...]
    policy: Policy
    step: int = 0
    in_a_row: int = 0
    here: int = 0
    num_given_up: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.num_given_up and self.devices else {}

    def after(self, error: WorkerError, step: int) -> _State:
        """Count the failure. Raises it if it was one too many."""
        is_new = step > self.step
        counted = replace(
            self, step=step, in_a_row=1 if is_new else self.in_a_row + 1, here=1 if is_new else self.here + 1
        )
        if counted.in_a_row > self.policy.max_failures:
            told = f"given up at step {step}: {counted.in_a_row} failures without a new checkpoint; the last: {error}"
            raise WorkerError(told, rank=error.rank) from error
        if counted.here < self.policy.patience + 1 or self.plan.decisions.num_gpus == 1:
            return counted
        rank = error.rank if error.rank is not None and error.rank < len(self.devices) else len(self.devices) - 1
        kept = tuple(device for i, device in enumerate(self.devices) if i != rank)
        return replace(counted, devices=kept, here=0, num_given_up=self.num_given_up + 1)

    def on(self, num_gpus: int, say: Say) -> _State:
        """With a plan for so many devices. Raises InfeasibleError if there is none."""
        if num_gpus < 1:
            raise InputError("no device is left to go on with")
        if num_gpus == self.plan.decisions.num_gpus:
            return self
        return replace(self, plan=plan_again(self.plan, num_gpus, say), here=0)


def plan_again(plan: Plan, num_gpus: int, say: Say | None = None) -> Plan:
    """The same request for another number of devices, from the cache where it holds the answer.

    Raises:
        InputError: the plan is for several types of GPU.
        PlanMismatchError: the model is no longer the plan's.
        InfeasibleError: nothing fits on so many.
    """
    if plan.cluster.description is not None:
        raise InputError("a cluster of several types of GPU has changed: plan again, with another --cluster")
    say = say or _silent
    count = plan.decisions.num_microbatches
    same = Pins(num_microbatches=count)
    failure: InfeasibleError | None = None
    for pins, use_all in ((same, True), (Pins(), True), (Pins(), False)):
        request = replace(
            request_of(plan, pins),
            num_gpus=num_gpus,
            use_all=use_all,
            with_baselines=False,
            time_limit_s=REPLAN_LIMIT_S,
        )
        try:
            found = parse_plan(finished_plan(Command(plan.model.source, plan.model.options, request)).plan_text)
        except InfeasibleError as error:
            failure = failure or error
            continue
        check_unchanged(plan, found.model.graph_hash)
        if found.decisions.num_microbatches != count:
            say(f"no plan for {num_gpus} devices has {count} microbatches: batch norms and dropout see others now")
        say(f"planned again for {_words(num_gpus)}: {describe(found.decisions)}")
        return found
    assert failure is not None
    raise failure


def devices_here(plan: Plan) -> int:
    """GPUs that the driver lists; for a plan that runs on the CPU as many as it uses: a process is no device."""
    found = len(detect_gpus())
    return found if found and plan.cluster.gpu != "cpu" else plan.decisions.num_gpus


def _visible_devices() -> tuple[str, ...]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part.strip() for part in named.split(",") if part.strip())
    return tuple(str(index) for index in range(len(detect_gpus())))


def _step_of(settings: RunSettings) -> int:
    """Of the newest checkpoint that is whole; 0: there is none."""
    from autopar.runtime.checkpoint_store import CheckpointStore

    return CheckpointStore(Path(settings.checkpoints)).latest() or 0


def _first_line(error: WorkerError) -> str:
    return (str(error).splitlines() or [""])[0]


def _words(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _silent(_: str) -> None:
    """Say nothing."""
