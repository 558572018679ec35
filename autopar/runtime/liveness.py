"""Who is still there: each rank counts up a number in the store, and sees the others' numbers rise.

A rank whose number stands still is stopped, cut off, or gone. A rank that fails writes down why, so that the others can
name the cause rather than its effect on themselves. All of it runs on threads with a connection of their own, because a
store that is cut off does not answer at all.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from autopar.torch_adapter import Store, connect_again

BEAT_S = 0.5
"""Between two beats of up to `BEAT_RANKS` ranks; more ranks beat less often, so that the store keeps its load."""
BEAT_RANKS = 32
SILENT_BEATS = 6
"""After so many beats without news a rank counts as gone;"""
CUT_BEATS = 3
"""where a connection broke, after so many."""
SETTLE_S = 1.0
"""How long a failing rank waits at most for what the others, which fail at the same time, have to say."""
LISTEN_S = 0.1
"""Between two looks at how many have said it."""
STOP_S = 2.0
"""How long the end waits for a thread that the store has not answered yet."""


@dataclass(frozen=True)
class Sight:
    """What a failing rank knows of the others.

    Attributes:
        silent: seconds since the last sign of life, by rank, of those that count as gone.
        reasons: why other ranks failed; by rank, "" for ranks that wait as well.
        store_silent_s: seconds since the store last answered, if it is silent, else None.
    """

    silent: Mapping[int, float]
    reasons: Mapping[int, str]
    store_silent_s: float | None


def announce(store: Store, rank: int) -> None:
    """This rank's first sign of life."""
    store.set(_beat_key(rank), "0")


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


class Liveness:
    """Beats of this rank, and the others' as seen from here."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Every rank must make one, after all have called `announce`."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._period_s = BEAT_S * max(1.0, world_size / BEAT_RANKS)
        self._over = threading.Event()
        self._is_gone = False
        self._answered_s = time.monotonic()
        self._numbers: list[bytes] = [b""] * world_size
        self._changed_s = [self._answered_s] * world_size
        self._thread = threading.Thread(target=self._beat, daemon=True, name="liveness")
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """No more beats; also at the process's end, which aborts where a thread is still inside the store."""
        atexit.unregister(self.stop)
        self._over.set()
        self._thread.join(STOP_S)

    def sight(self, reason: str, *, is_cut: bool = False) -> Sight:
        """Tell the others that this rank fails, and hear what they have to say.

        Args:
            reason: "" if this rank waited in vain for others.
            is_cut: a connection broke just now, so that silence is still short.
        """
        heard: dict[int, str] = {}
        settle_s = SETTLE_S * (2 if is_cut else 1)
        limit_s = self._period_s * (CUT_BEATS if is_cut else SILENT_BEATS)
        asking = threading.Thread(target=self._exchange, args=(reason, heard, settle_s), daemon=True, name="last words")
        asking.start()
        asking.join(2 * settle_s)
        now = time.monotonic()
        if self._is_gone or asking.is_alive():
            return Sight({}, dict(heard), now - self._answered_s)
        silent = {
            rank: now - then
            for rank, then in enumerate(self._changed_s)
            if rank != self._rank and now - then > limit_s and rank not in heard
        }
        return Sight(silent, dict(heard), None)

    def _beat(self) -> None:
        keys = [_beat_key(rank) for rank in range(self._world_size)]
        count = 0
        try:
            own = connect_again(self._store)
            while not self._over.wait(self._period_s):
                count += 1
                own.set(keys[self._rank], str(count))
                self._note(own.multi_get(keys))
        except dist.DistError:
            self._is_gone = True

    def _note(self, numbers: Sequence[bytes]) -> None:
        self._answered_s = time.monotonic()
        for rank, number in enumerate(numbers):
            if number != self._numbers[rank]:
                self._numbers[rank], self._changed_s[rank] = number, self._answered_s

    def _exchange(self, reason: str, heard: dict[int, str], settle_s: float) -> None:
        try:
            own = connect_again(self._store)
            own.set(f"last/{self._rank}", json.dumps(reason))
            own.add("failing", 1)
            deadline = time.monotonic() + settle_s
            while own.add("failing", 0) < self._world_size and time.monotonic() < deadline:
                time.sleep(LISTEN_S)
            for rank in range(self._world_size):
                if rank != self._rank and own.check([f"last/{rank}"]):
                    heard[rank] = json.loads(own.get(f"last/{rank}"))
            # On a host with too much to do this process may be late with its looks, which must not count as silence.
            self._note(own.multi_get([_beat_key(rank) for rank in range(self._world_size)]))
        except dist.DistError:
            self._is_gone = True
