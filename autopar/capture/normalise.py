"""Normal forms: different spellings of one computation become the one that splits best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autopar.capture.causal import make_causal
from autopar.capture.grouped import group_queries
from autopar.capture.regions import fold_regions
from autopar.capture.unmerge import remove_dead, unmerge
from autopar.ir.graph import Op, Value


def normalise(
    ops: list[Op], values: dict[str, Value], scopes: Mapping[str, str], results: Iterable[str]
) -> tuple[list[Op], Mapping[str, str]]:
    """The ops in normal form and their scopes (module path by name of op); `values` is changed in place."""
    ops = group_queries(make_causal(ops, values), values)
    ops, scopes = unmerge(ops, values, scopes)
    return fold_regions(remove_dead(ops, values, results), values), scopes
