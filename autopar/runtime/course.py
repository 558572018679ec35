"""Course: the steps of a run on one rank, from where the last checkpoint ended; writes the next ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from autopar.errors import StragglerError
from autopar.ir.quantity import Quantity
from autopar.ir.run import RunSettings
from autopar.runtime.checkpoint import Saver
from autopar.runtime.checkpoint_store import CheckpointStore, Position
from autopar.runtime.executor import Executor
from autopar.runtime.measure import Measured
from autopar.runtime.resume import is_first, say, take_up
from autopar.runtime.stragglers import Straggler, Watch

HISTORY = "history.csv"
"""In the directory of checkpoints: step, loss, seconds, processes. A step that was done again stands there again."""


RECENT_STEPS = 100
"""Of the history, that count where a run has no step of its own."""


class Course:
    """See the module docstring. Every rank must make one and call the same methods."""

    def __init__(
        self,
        executor: Executor,
        settings: RunSettings,
        start: Position,
        *,
        aliases: Mapping[str, str],
        work: Sequence[float],
    ) -> None:
        """Load the newest checkpoint, if there is one.

        Args:
            executor: of this rank, as new.
            settings: of the run.
            start: where the run begins where there is no checkpoint, at step 0.
            aliases: of the model, see `Checkpoint`.
            work: that the plan gives each rank in a step, in any unit.

        Raises:
            InputError: the checkpoints are of another model, batch or order of samples, or all are damaged.
        """
        self.position = start
        self.remarks: list[str] = []
        self._executor, self._settings = executor, settings
        self._store = CheckpointStore(Path(settings.checkpoints), settings.keep) if settings.checkpoints else None
        if self._store is not None:
            self.position, remarks = take_up(executor, self._store, start)
            self.remarks += remarks
            self._saver = Saver(self._store, aliases, is_async=settings.is_async)
        is_watched = self._store is not None and _world() > 1 and executor.options.device == "cpu"
        self._watch = Watch(work) if is_watched else None
        self.straggler: Straggler | None = None

    @property
    def num_left(self) -> int:
        """Steps to do. A worker that is lost at the very end leaves none."""
        return max(0, self._settings.steps - self.position.step)

    def past(self) -> Measured:
        """What the history says of steps that were done before, for a run with none left. Nothing was metered."""
        assert self._store is not None
        rows = [line.split(",") for line in (self._store.root / HISTORY).read_text(encoding="ascii").splitlines()]
        seconds = [float(row[2]) for row in rows[-RECENT_STEPS:]]
        step_time = Quantity(statistics.median(seconds), "s", "measured", min(seconds), max(seconds))
        return Measured((), step_time, None, 0, 1, 0.0)

    def after_step(self, done: int, loss: float, seconds: float) -> None:
        """Note a step; write a checkpoint when it is time."""
        self.position = replace(self.position, step=done)
        if self._store is None:
            return
        if is_first():
            self._store.root.mkdir(parents=True, exist_ok=True)
            with (self._store.root / HISTORY).open("a", encoding="ascii") as file:
                file.write(f"{done},{loss!r},{seconds:.6g},{_world()}\n")
        every = self._settings.every
        is_due = done == self._settings.steps or bool(every and done % every == 0)
        if is_due:
            self.save()
        if self._watch is not None:
            self._look_out(self._watch, is_due)

    def _look_out(self, watch: Watch, is_saved: bool) -> None:
        """Tell of a straggler once; raise StragglerError if the run is to go on without it."""
        found = watch.after_step()
        if found is None or self.straggler is not None or self.position.step == self._settings.steps:
            return
        self.straggler = found
        say(str(found))
        if self._settings.adapt:
            if not is_saved:
                self.save()
            self.finish()
            raise StragglerError(str(found), rank=found.rank)

    def save(self) -> None:
        """Write a checkpoint now."""
        assert self._store is not None
        started = time.perf_counter()
        self._saver.save(self._executor, self.position)
        how = "copied" if self._settings.is_async else "written"
        say(f"checkpoint {self._store.path(self.position.step)} {how} in {time.perf_counter() - started:.2g} s")

    def finish(self) -> None:
        """Wait for what is still being written."""
        if self._watch is not None:
            self._watch.stop()
        if self._store is not None:
            self._saver.finish()


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
