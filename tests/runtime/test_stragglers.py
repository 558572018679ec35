"""Which rank makes the others wait."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType

import pytest

from autopar.runtime.stragglers import SLOW, Watch, find_straggler, is_waiting


@pytest.mark.parametrize(
    ("working_s", "expected", "rank"),
    [
        ([1.0, 1.0, 2.0, 1.0], [1, 1, 1, 1], 2),
        ([1.0, 1.0, 1.4, 1.0], [1, 1, 1, 1], None),
        ([1.0, 3.0], [1, 3], None),
        ([1.0, 3.0], [3, 1], 1),
        ([2.0, 1.0], [1, 1], 0),
        ([2.0], [1], None),
        ([0.0, 0.0, 0.0], [1, 1, 1], None),
        ([1.0, 5.0], [0, 0], None),
    ],
)
def test_the_slow_rank_is_the_one_that_works_longest_for_its_share(
    working_s: list[float], expected: list[float], rank: int | None
) -> None:
    found = find_straggler(working_s, expected)
    assert (None if found is None else found.rank) == rank
    if found is not None:
        others = min(w / e for w, e in zip(working_s, expected, strict=True))
        assert found.factor >= SLOW
        assert found.factor == pytest.approx(working_s[found.rank] / expected[found.rank] / others)
        assert found.usual_s * found.factor == pytest.approx(found.working_s)


def test_a_frame_of_a_collective_waits_and_one_of_ours_works() -> None:
    names = {"torch.distributed.distributed_c10d": True, "autopar.runtime.buckets": True, "torch.autograd.graph": False}
    for name, expected in names.items():
        frames: dict[str, FrameType] = {}
        exec("import sys\nfound = sys._getframe()", scope := {"__name__": name})
        frames["it"] = scope["found"]  # type: ignore[assignment]
        assert is_waiting(frames["it"]) == expected


def test_time_is_working_time_unless_a_collective_is_innermost() -> None:
    waiting = threading.Event()
    exec("import sys\nfound = sys._getframe()", scope := {"__name__": "torch.distributed.distributed_c10d"})
    collective, own = scope["found"], sys._getframe()
    watch = Watch([1.0], lambda: collective if waiting.is_set() else own)  # type: ignore[return-value]
    while watch._working_s < 0.1:
        time.sleep(0.01)
    waiting.set()
    time.sleep(0.1)
    before = watch._working_s
    time.sleep(0.1)
    assert watch._working_s == before
    watch.stop()
