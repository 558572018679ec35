"""Region ops: the calls inside, with this rank's token counts in place of the global ones."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.ir.graph import Arg, Op
from autopar.rules.local import LocalCall

CREATORS = ("aten.arange.", "aten.zeros.", "aten.ones.", "aten.full.", "aten.empty.")
"""Calls that make a tensor as long as the tokens from a number alone."""


def member_call(member: Op, region_kwargs: Mapping[str, Arg]) -> LocalCall:
    """The member's call on the local tokens.

    In a region tokens are counted by dim 0. So a count stands first in a list of sizes, or is the length of an
    `arange`; numbers anywhere else mean something else, even where they are equal.
    """
    pairs = zip(_counts(region_kwargs, "token_counts"), _counts(region_kwargs, "local_token_counts"), strict=True)
    local = dict(pairs)
    creates = member.target.startswith(CREATORS)
    args = tuple(_replace(arg, local, creates=creates) for arg in member.args)
    kwargs = {key: _replace(arg, local, creates=False) for key, arg in member.kwargs.items()}
    return LocalCall(member.target, args, kwargs)


def _counts(kwargs: Mapping[str, Arg], key: str) -> tuple[int, ...]:
    found = kwargs.get(key, ())
    return tuple(c for c in found if isinstance(c, int)) if isinstance(found, tuple) else ()


def _replace(arg: Arg, local: Mapping[int, int], *, creates: bool) -> Arg:
    if isinstance(arg, tuple) and arg and isinstance(arg[0], int):
        return (local.get(arg[0], arg[0]), *arg[1:])
    if creates and isinstance(arg, int) and not isinstance(arg, bool):
        return local.get(arg, arg)
    return arg
