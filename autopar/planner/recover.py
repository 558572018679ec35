"""A run that survives its workers: after a failure it goes on from the last checkpoint, on the devices that are left.

`run_surviving` starts the run, and again after each failure that another start may get over (a worker was killed, hung,
lost its device or its peers). If fewer devices are left, the model is planned again for them, under the same request:
objective, limits, batch and software stay, and so does the number of microbatches where a plan with it exists, since
batch norms depend on it. A failure that repeats without a new checkpoint in between ends the run.

Under torchrun it is torchrun that restarts; `plan_for_world` then plans for as many processes as it started.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from autopar.errors import InfeasibleError, InputError, StragglerError, WorkerError
from autopar.ir.hosts import Hosts
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.planner.again import Say, counted, plan_again
from autopar.planner.choose import describe
from autopar.planner.detect import detect_gpus
from autopar.planner.execute import RunReport, run_plan
from autopar.planner.request import say_nothing
from autopar.planner.settings import BoardSettings

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
        advice: the plan that would suit a straggler that was seen; "": there was none.
    """

    report: RunReport
    plan: Plan
    restarts: tuple[Restart, ...]
    advice: str = ""

    def __str__(self) -> str:
        lines = [self.advice] if self.advice else []
        lines += [
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
    policy, say, count = policy or Policy(), progress or say_nothing, count_devices or devices_here
    if settings.adapt and _is_restarted_by_launcher():
        raise InputError("--adapt is for runs without torchrun, which says itself how many processes there are")
    state = _State(plan, _visible_devices(), policy)
    restarts: list[Restart] = []
    while True:
        try:
            report = run_plan(
                state.plan,
                settings,
                boards=boards if boards is None or state.plan is plan else boards.for_another_plan(),
                hosts=hosts,
                progress=progress,
                environment=state.environment,
            )
        except WorkerError as error:
            if not settings.checkpoints or not error.is_lost or _is_restarted_by_launcher():
                raise
            before = state.plan.decisions.num_gpus
            step = _step_of(settings)
            if isinstance(error, StragglerError):
                state = state.without(error.rank)
                settings = replace(settings, adapt=False)
            else:
                state = state.after(error, step)
            if hosts is None or hosts.num_nodes == 1:
                state = state.on(min(count(plan), plan.decisions.num_gpus - state.num_given_up), say)
            after = state.plan.decisions.num_gpus
            restarts.append(Restart(_first_line(error), step, (before, after)))
            say(f"{_first_line(error)}; going on from step {step} with {counted(after)}")
            continue
        return Survived(report, state.plan, tuple(restarts), _advice(state.plan, report))


def _advice(plan: Plan, report: RunReport) -> str:
    """What a step would take without the straggler, against what it takes with it."""
    if report.straggler is None:
        return ""
    rank, factor = report.straggler
    told = f"  straggler  rank {rank} was {factor:.2g} times slower than the others (measured)"
    if plan.decisions.num_gpus == 1 or plan.cluster.description is not None:
        return told
    try:
        other = plan_again(plan, plan.decisions.num_gpus - 1)
    except InfeasibleError:
        return f"{told}; no plan fits on the others alone"
    ratio = other.predicted.step_time_s.value / (plan.predicted.step_time_s.value * factor)
    verdict = "--adapt goes on so" if ratio < 1 else "the slow device still pays"
    return (
        f"{told}; without it, as {describe(other.decisions)}, a step takes {ratio:.2g} times as long as with it "
        f"(modelled): {verdict}"
    )


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
        noted = replace(
            self, step=step, in_a_row=1 if is_new else self.in_a_row + 1, here=1 if is_new else self.here + 1
        )
        if noted.in_a_row > self.policy.max_failures:
            told = f"given up at step {step}: {noted.in_a_row} failures without a new checkpoint; the last: {error}"
            raise WorkerError(told, rank=error.rank) from error
        if noted.here < self.policy.patience + 1 or self.plan.decisions.num_gpus == 1:
            return noted
        return noted.without(error.rank)

    def without(self, rank: int | None) -> _State:
        """Leave a device behind: that of the rank where it is known, else the last."""
        place = rank if rank is not None and rank < len(self.devices) else len(self.devices) - 1
        kept = tuple(device for i, device in enumerate(self.devices) if i != place)
        return replace(self, devices=kept, here=0, num_given_up=self.num_given_up + 1)

    def on(self, num_gpus: int, say: Say) -> _State:
        """With a plan for so many devices. Raises InfeasibleError if there is none."""
        if num_gpus < 1:
            raise InputError("no device is left to go on with")
        if num_gpus == self.plan.decisions.num_gpus:
            return self
        return replace(self, plan=plan_again(self.plan, num_gpus, say), here=0)


def devices_here(plan: Plan) -> int:
    """GPUs that the driver lists; for a plan that runs on the CPU as many as it uses: a process is no device."""
    found = len(detect_gpus())
    return found if found and plan.cluster.gpu != "cpu" else plan.decisions.num_gpus


def _is_restarted_by_launcher() -> bool:
    from autopar.runtime.ending import is_torchrun

    return is_torchrun()


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
