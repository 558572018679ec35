"""Which calls of a program are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class Reads(Protocol):
    """A call by the names of what it reads, makes and changes in place."""

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    @property
    def mutates(self) -> tuple[str, ...]: ...


C = TypeVar("C", bound=Reads)


def live_calls(calls: Sequence[C], results: Iterable[str]) -> list[C]:
    """Calls that the results or a buffer update need, in order."""
    needed = set(results)
    live: list[C] = []
    for call in reversed(calls):
        if call.mutates or needed.intersection(call.outputs):
            needed.update(call.inputs)
            live.append(call)
    return live[::-1]
