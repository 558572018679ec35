"""Kill -9 of random workers at random moments of one run, against the same run undisturbed.

    python benchmarks/failures.py [--quick] [--json] [--kills 20] [--steps 400] [--every 10] [--seed 0]

The run starts on 4 processes; after a third of the kills 3 devices are left, after two thirds 2, and the model is
planned again for them. One kill in four waits for a checkpoint that is being written, one in four hits workers that are
starting, the others come 0 to 2 s after a step. Each line ends in its figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.ir.solution import Pins
from autopar.planner.execute import run_plan
from autopar.planner.plan import plan_model
from autopar.planner.recover import Policy, Survived, run_surviving
from autopar.planner.request import PlanRequest

MODEL = Path(__file__).parent / "models" / "points.py"
SIZES = (4, 3, 2)
LONGEST_WAIT_S = 2.0
MOMENTS = ("step", "writing", "step", "starting")


@dataclass(frozen=True)
class Kill:
    """One kill: `moment` as aimed at; `step` that was last told, and `saved`, of the newest checkpoint then."""

    moment: str
    rank: int
    num_processes: int
    step: int
    saved: int
    is_writing: bool


@dataclass
class Killer:
    """Follows a run by the lines it prints and kills its workers on a thread of its own."""

    directory: Path
    num_kills: int
    seed: int
    sizes: tuple[int, ...] = SIZES
    moments: tuple[str, ...] = MOMENTS
    how: signal.Signals = signal.SIGKILL
    kills: list[Kill] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    _others: frozenset[int] = frozenset()
    _step: int = 0
    _is_over: bool = False
    _left_over: set[int] = field(default_factory=set)
    _starts: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _steps: threading.Event = field(default_factory=threading.Event)

    def follow(self, line: str) -> None:
        """Take note of a line of the run."""
        if line.startswith("starting "):
            self._left_over = self._partial()
            self._steps.clear()
            self._starts.release()
        if line.startswith("step "):
            self._step = int(line.removeprefix("step ").partition("/")[0])
            self._steps.set()

    def devices(self, _: Plan) -> int:
        """Devices that are left, by how many kills there were."""
        place = len(self.kills) * len(self.sizes) // (self.num_kills + 1)
        return self.sizes[place]

    def start(self) -> threading.Thread:
        """Begin to kill, once in the life of each start of the run; workers of other runs that are there stay alone."""
        self._others = frozenset(workers_of(os.getpid()))
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """No more kills."""
        self._is_over = True
        self._starts.release()

    def _work(self) -> None:
        draw = random.Random(self.seed)
        while len(self.kills) < self.num_kills and not self._is_over:
            self._starts.acquire()
            moment = self.moments[len(self.kills) % len(self.moments)]
            self._wait_for(moment, draw)
            workers = self._workers()
            self.seen |= set(workers)
            if self._is_over or not workers:
                continue
            victim = draw.choice(sorted(workers))
            is_writing = self._is_writing()
            os.kill(victim, self.how)
            saved = newest_step(self.directory)
            self.kills.append(Kill(moment, workers[victim], len(workers), self._step, saved, is_writing))

    def _workers(self) -> dict[int, int]:
        return {worker: rank for worker, rank in workers_of(os.getpid()).items() if worker not in self._others}

    def _wait_for(self, moment: str, draw: random.Random) -> None:
        if moment == "starting":
            time.sleep(draw.uniform(0.5, 4.0))
            return
        while not self._steps.wait(0.2):
            if self._is_over:
                return
        self.seen |= set(self._workers())
        if moment == "step":
            time.sleep(draw.uniform(0, LONGEST_WAIT_S))
            return
        deadline = time.monotonic() + 20
        while not self._is_writing() and time.monotonic() < deadline and not self._is_over:
            time.sleep(0.0005)

    def _is_writing(self) -> bool:
        """A checkpoint is being written by this start of the run, rather than left half written by an earlier one."""
        return bool(self._partial() - self._left_over)

    def _partial(self) -> set[int]:
        """Inodes of directories of checkpoints that are not whole."""
        found = set()
        for path in self.directory.glob("step_*.partial"):
            with contextlib.suppress(FileNotFoundError):
                found.add(path.stat().st_ino)
        return found


def workers_of(parent: int, word: bytes = b"autopar.runtime.worker") -> dict[int, int]:
    """Ranks of the worker processes of a parent, whose command has the word, by process."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            state, owner = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(owner) != parent or state == "Z" or word not in (path / "cmdline").read_bytes().split(b"\0"):
                continue
            variables = dict(part.partition(b"=")[::2] for part in (path / "environ").read_bytes().split(b"\0"))
            found[int(path.name)] = int(variables[b"RANK"])
        except (OSError, KeyError, ValueError):
            continue
    return found


def is_alive(process: int) -> bool:
    """Whether the process runs; one that has ended but was not waited for does not."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest_step(directory: Path) -> int:
    """Of the newest checkpoint that stands there under its final name."""
    return max((int(p.name.removeprefix("step_")) for p in directory.glob("step_*") if not p.suffix), default=0)


def losses_of(directory: Path) -> dict[int, float]:
    """Loss of each step; of a step that was done again, the last."""
    rows = (line.split(",") for line in (directory / "history.csv").read_text().splitlines())
    return {int(step): float(loss) for step, loss, *_ in rows}


def make_plan(num_gpus: int) -> Plan:
    """All of these processes, without limits."""
    request = PlanRequest(num_gpus=num_gpus, gpu="cpu", use_all=True, pins=Pins(), with_baselines=False)
    return plan_model(str(MODEL), {}, request)


def disturbed_run(plan: Plan, settings: RunSettings, killer: Killer) -> Survived:
    """The run with its kills."""
    thread = killer.start()
    try:
        return run_surviving(
            plan,
            settings,
            policy=Policy(max_failures=killer.num_kills, patience=killer.num_kills),
            progress=killer.follow,
            count_devices=killer.devices,
        )
    finally:
        killer.stop()
        thread.join(10)


def measure(num_kills: int, steps: int, every: int, seed: int) -> dict[str, object]:
    """Figures of both runs."""
    plan = make_plan(SIZES[0])
    with tempfile.TemporaryDirectory(prefix="autopar-failures-") as name:
        calm, rough = Path(name) / "calm", Path(name) / "rough"
        run_plan(plan, RunSettings(steps=steps, checkpoints=str(calm), every=every))
        started, killer = time.perf_counter(), Killer(rough, num_kills, seed)
        survived = disturbed_run(plan, RunSettings(steps=steps, checkpoints=str(rough), every=every), killer)
        wall_s = time.perf_counter() - started
        expected, found = losses_of(calm), losses_of(rough)
    killed = [restart for restart in survived.restarts if "SIGKILL" in restart.cause]
    pairs = list(zip(killer.kills, killed, strict=True))
    lost = [kill.saved - restart.step for kill, restart in pairs]
    again = [max(0, kill.step - restart.step) for kill, restart in pairs]
    return {
        "kills": len(killer.kills),
        "restarts": len(survived.restarts),
        "other_failures": [restart.cause for restart in survived.restarts if "SIGKILL" not in restart.cause],
        "processes": [survived.restarts[0].num_gpus[0], *(r.num_gpus[1] for r in survived.restarts)],
        "moments": {m: sum(k.moment == m for k in killer.kills) for m in sorted(set(MOMENTS))},
        "kills_while_writing": sum(k.is_writing for k in killer.kills),
        "steps": len(found),
        "missing_steps": sorted(set(expected) - set(found)),
        "first_loss": found[1],
        "last_loss": found[max(found)],
        "largest_relative_difference": max(
            abs(found[s] - expected[s]) / abs(expected[s]) for s in expected if s in found
        ),
        "steps_lost_beyond_checkpoint": max(0, *lost),
        "most_steps_done_again": max(again),
        "processes_left_over": sum(is_alive(process) for process in killer.seen),
        "wall_s": wall_s,
    }


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two kills, 40 steps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = (2, 40, 5) if given.quick else (given.kills, given.steps, given.every)
    figures = measure(*sizes, given.seed)
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        for key, value in figures.items():
            print(
                f"{key.replace('_', ' '):32} {value:.3g}"
                if isinstance(value, float)
                else f"{key.replace('_', ' '):32} {value}"
            )
    is_good = (
        figures["steps_lost_beyond_checkpoint"] == figures["processes_left_over"] == 0 and not figures["missing_steps"]
    )
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
