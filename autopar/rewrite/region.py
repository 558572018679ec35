"""Region ops: the calls inside, with token counts in place of global ones."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.ir.graph import Arg, Op
from autopar.rules.local import LocalCall


def member_args(member: Op, region_kwargs: Mapping[str, Arg]) -> LocalCall:
    """The member's call on the local tokens: every size that is a token count of the region becomes the local count.

    Only integers are counts; a size that equals a count by chance would be changed too, which is why capture gives
    a region only counts that no other size of it equals.
    """
    pairs = zip(_counts(region_kwargs, "token_counts"), _counts(region_kwargs, "local_token_counts"), strict=True)
    local = dict(pairs)
    args = tuple(_replace(arg, local) for arg in member.args)
    return LocalCall(member.target, args, {key: _replace(arg, local) for key, arg in member.kwargs.items()})


def _counts(kwargs: Mapping[str, Arg], key: str) -> tuple[int, ...]:
    found = kwargs.get(key, ())
    return tuple(c for c in found if isinstance(c, int)) if isinstance(found, tuple) else ()


def _replace(arg: Arg, local: Mapping[int, int]) -> Arg:
    if isinstance(arg, tuple):
        return tuple(_replace(item, local) for item in arg)
    if isinstance(arg, int) and not isinstance(arg, bool):
        return local.get(arg, arg)
    return arg
