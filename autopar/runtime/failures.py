"""One message for a collective that does not end: who waited, in which collective, for whom, what to look at.

Gloo raises `RuntimeError` with a text of its own in the rank that waited (NCCL: see `nccl_log`). It does not say which
rank is missing: that is what `liveness` knows.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from autopar import torch_adapter
from autopar.runtime.hosts import Meeting
from autopar.runtime.liveness import Sight
from autopar.runtime.rendezvous import Peer

WAITED = re.compile(r"Timed out waiting|Application timeout|wait timeout after|timed out after", re.IGNORECASE)
LOST = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|No route to host|Network is unreachable|Connection timed out|"
    r"Connection was likely closed|recv, len: 0|(?:Read|Write) error|connectFullMesh failed|network error",
    re.IGNORECASE,
)
COLLECTIVES_FILE = "distributed_c10d.py"


def is_network_failure(error: BaseException) -> bool:
    """Whether the error says that other ranks did not answer, rather than that something is wrong here."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and bool(WAITED.search(str(error)) or LOST.search(str(error)))


def is_cut(error: BaseException) -> bool:
    """Whether a connection broke, as opposed to a wait that took too long."""
    return LOST.search(str(error)) is not None and WAITED.search(str(error)) is None


class EndedError(KeyboardInterrupt):
    """SIGTERM of the launcher, which has lost a process, or whose user wants no more."""


def place_of(error: BaseException) -> str:
    """The collective and the function outside torch that waited for it: `all_reduce (Bucket.finish in buckets.py)`."""
    unknown = "its own work" if isinstance(error, EndedError) else "a collective"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if not _is_signals(frame)]
    if not frames:
        return unknown
    outside = [index for index, frame in enumerate(frames) if not _is_torchs(frame)]
    last = outside[-1] if outside else 0
    after = [frame for frame in frames[last:] if frame.f_code.co_filename.endswith(COLLECTIVES_FILE)]
    name = after[0].f_code.co_name if after else _awaited(frames[last:]) or unknown
    code = frames[last].f_code
    where = getattr(code, "co_qualname", code.co_name)  # of Python 3.11
    return f"{name} ({where} in {Path(code.co_filename).name})"


def _is_torchs(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in ("torch", "contextlib")


def _is_signals(frame: FrameType) -> bool:
    return frame.f_code is raise_ended.__code__


def raise_ended(_number: int, _frame: FrameType | None) -> None:
    """Handler of SIGTERM."""
    raise EndedError


def _awaited(frames: Sequence[FrameType]) -> str:
    """Name of the collective whose `Work` the innermost of these frames holds; "" if none does."""
    for frame in reversed(frames):
        local = frame.f_locals
        for value in (*local.values(), *getattr(local.get("self"), "__dict__", {}).values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, dist.Work):
                    return torch_adapter.collective_name(item)
    return ""


def waiting_message(
    error: BaseException, sight: Sight, *, rank: int, meeting: Meeting, peers: Mapping[int, Peer]
) -> str:
    """What to tell the user.

    Args:
        error: a network failure of this rank, or its `EndedError`.
        sight: of the other ranks at that moment.
        rank: of this process.
        meeting, peers: of the run.
    """
    if isinstance(error, EndedError):
        how = "was ended"
    else:
        how = "lost a connection" if is_cut(error) else f"waited {meeting.limit_s:g} s"
    return f"rank {rank} {how} in {place_of(error)}: {_cause(error, sight, rank, meeting, peers)}"


def missing_ranks(error: BaseException, sight: Sight, rank: int, peers: Mapping[int, Peer]) -> list[int]:
    """Ranks that failed, are silent or do not come, by what this rank knows; [] if all wait as it does."""
    failed = sorted(other for other, reason in sight.reasons.items() if reason)
    if failed:
        return failed[:1]
    if sight.store_silent_s is not None:
        return [0]
    if sight.silent:
        return sorted(sight.silent)
    if is_cut(error) or isinstance(error, EndedError):
        return []
    return [other for other in sorted(peers) if other != rank and other not in sight.reasons]


def _cause(error: BaseException, sight: Sight, rank: int, meeting: Meeting, peers: Mapping[int, Peer]) -> str:
    missing = missing_ranks(error, sight, rank, peers)
    if missing and sight.reasons.get(missing[0]):
        return f"{_named(missing, peers)} failed: {sight.reasons[missing[0]]}"
    if sight.store_silent_s is not None:
        seconds = f"silent for {sight.store_silent_s:.0f} s"
        return f"{_named(missing, peers)}, where the run meets, {seconds}; {_look_at(missing, peers, rank)}"
    if sight.silent:
        seconds = f"silent for {max(sight.silent.values()):.0f} s"
        return f"{_named(missing, peers)} {seconds}; {_look_at(missing, peers, rank)}"
    if is_cut(error):
        return "every rank lives, so something between the hosts broke the connection: a firewall, a proxy, a restart"
    if missing:
        return f"{_named(missing, peers)} lives but did not come to it: hung, or slower than --timeout allows"
    return "every rank lives and waits as well: the ranks disagree on what comes next, which is a bug"


def _named(ranks: Sequence[int], peers: Mapping[int, Peer]) -> str:
    """`rank 2, 3 on node 1 (10.0.0.2)`, node by node."""
    parts = []
    for node in sorted({peers[rank].node for rank in ranks}):
        here = [rank for rank in ranks if peers[rank].node == node]
        place = peers[here[0]].address or peers[here[0]].host
        parts.append(f"rank {', '.join(map(str, here))} on node {node} ({place})")
    return " and ".join(parts)


def _look_at(ranks: Sequence[int], peers: Mapping[int, Peer], rank: int) -> str:
    nodes = sorted({peers[other].node for other in ranks})
    if nodes == [peers[rank].node]:
        return "the process is stopped or was killed: look at its log and at the host's memory"
    places = sorted({peers[other].address or peers[other].host for other in ranks})
    return f"the process, its host or the link is down: look at what node {nodes[0]} printed and at 'ping {places[0]}'"
