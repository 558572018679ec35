"""Exact preprocessing of a model; every step keeps at least one optimal choice.

- `settle`: least usages move to the limits; a strategy that alone breaks a row goes; rows that cannot bind go.
- `consistent`: a strategy that is forbidden, or has no legal partner in some table, goes (arc consistency).
- `reparametrise`: least costs of table rows and columns move to the nodes; tables that become zero go.
- `fold_single`: a node with one strategy leaves, its tables become costs of its neighbours.
- `follow`: a node that a neighbour's strategy determines is merged into that neighbour.
- `dominate`: strategy p goes if some p' uses no more in any row and costs no more whatever the neighbours choose:
      c_p' - c_p + sum_j max_q ( r_j[p', q] - r_j[p, q] ) <= 0.
- `eliminate`: nodes in no row with at most two neighbours leave by min-plus (`reduce`).

Tables are handled in stacks of equal shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.costnet import rows
from autopar.search.costnet.model import Eliminated, Follow, Model
from autopar.search.costnet.rows import Integers, Term, segments
from autopar.search.reduce import core_network, make_plan, run_plan

Pair = tuple[int, int]

STACK = 1 << 21
"""Entries of temporary arrays made at a time."""
BIG = 1e18
"""Stands for a forbidden cost in dominance; far above any sum of legal costs, so that signs are right."""
GROWTH = 2_500
"""Entries by which a merge or an elimination may enlarge the tables: more than it saves costs more than it helps."""
LARGEST_BUCKET = 400_000
"""Entries of the largest table over an eliminated node and its neighbours."""
MAX_PASSES = 12
LEAST_PROGRESS = 0.002
"""Share of strategies that a pass must remove to be followed by another."""


class InfeasibleModelError(Exception):
    """No choice satisfies the model; raised inside the package and turned into a status."""


def shrink(model: Model, deadline: float = math.inf) -> None:
    """Apply all steps until little changes or `deadline` (perf_counter); raises InfeasibleModelError."""
    merging = (settle, consistent, fold_single, reparametrise, follow)
    steps = (*merging, settle, consistent, reparametrise, dominate, fold_single, reparametrise, eliminate)
    for _ in range(MAX_PASSES):
        before = model.size()[:2]
        for step in steps:
            if time.perf_counter() < deadline:
                step(model)
        after = model.size()[:2]
        if before[1] - after[1] <= LEAST_PROGRESS * before[1] and before[0] == after[0]:
            break
    settle(model)
    consistent(model)


def stacks(model: Model, pairs: Iterable[Pair]) -> Iterator[tuple[list[Pair], Array]]:
    """Tables of equal shape, stacked: [pairs, strategies of i, strategies of j]."""
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(model.tables[pair].shape, []).append(pair)
    for shape in sorted(groups):
        members = groups[shape]
        step = max(1, STACK // (shape[0] * shape[1]))
        for k in range(0, len(members), step):
            part = members[k : k + step]
            yield part, np.stack([model.tables[pair] for pair in part])


def settle(model: Model) -> None:
    """Strip the rows and delete strategies that no row can bear."""
    while True:
        before = [len(own) for own in model.terms]
        model.terms, model.limits, keep = rows.settle(model.terms, model.limits)
        model.dirty |= {node for node, own in enumerate(model.terms) if len(own) < before[node]}
        model.rows = model.rows[keep]
        if np.any(model.limits < 0):
            raise InfeasibleModelError(f"memory exceeded by {-float(model.limits.min()):.0f} at least")
        doomed = _unbearable(model)
        for node, fits in sorted(doomed.items()):
            _restrict(model, node, fits)
        if not doomed:
            return


def _unbearable(model: Model) -> dict[int, NDArray[np.bool_]]:
    """Nodes with strategies that alone break a row, and which of theirs do not."""
    flat = [(node, term) for node, own in enumerate(model.terms) for term in own]
    if not flat:
        return {}
    begin, end = np.array([(term.begin, term.end) for _, term in flat]).T
    room = rows.range_least(model.limits, begin, end)
    sizes = np.array([len(term.amount) for _, term in flat])
    largest = np.maximum.reduceat(np.concatenate([term.amount for _, term in flat]), np.cumsum(sizes) - sizes)
    doomed: dict[int, NDArray[np.bool_]] = {}
    for k in np.flatnonzero(largest > room).tolist():
        node, term = flat[k]
        fits = term.amount <= room[k]
        doomed[node] = doomed[node] & fits if node in doomed else fits
    return doomed


def _restrict(model: Model, node: int, keep: NDArray[np.bool_]) -> None:
    if not keep.any():
        raise InfeasibleModelError(f"node {node} has no strategy left")
    model.restrict(node, np.flatnonzero(keep))


def consistent(model: Model) -> None:
    """Delete forbidden strategies and those without a legal partner, until none is left."""
    for node in model.nodes:
        legal = np.isfinite(model.unary[node])
        if not legal.all():
            _restrict(model, node, legal)
    while todo := model.take_stale("legal"):
        keep: dict[int, NDArray[np.bool_]] = {}
        for pairs, tables in stacks(model, todo):
            legal = np.isfinite(tables)
            by_row: NDArray[np.bool_] = np.asarray(legal.any(axis=2))
            by_column: NDArray[np.bool_] = np.asarray(legal.any(axis=1))
            for k in np.flatnonzero(~(by_row.all(axis=1) & by_column.all(axis=1))):
                for node, alive in zip(pairs[k], (by_row[k], by_column[k]), strict=True):
                    keep[node] = keep[node] & alive if node in keep else alive
        changed = [node for node in sorted(keep) if not keep[node].all()]
        for node in changed:
            _restrict(model, node, keep[node])


def reparametrise(model: Model) -> None:
    """Move row and column minima to the nodes (all finite after `consistent`) and drop zero tables."""
    for pairs, tables in stacks(model, model.take_stale("least")):
        by_row = tables.min(axis=2)
        rest = tables - by_row[:, :, None]
        by_column = rest.min(axis=1)
        rest -= by_column[:, None, :]
        is_zero = ~rest.any(axis=(1, 2))
        is_moved = by_row.any(axis=1) | by_column.any(axis=1)
        for k in np.flatnonzero(is_moved | is_zero):
            i, j = pairs[k]
            model.unary[i] = model.unary[i] + by_row[k]
            model.unary[j] = model.unary[j] + by_column[k]
            if is_zero[k]:
                model.drop_table(i, j)
            else:
                model.tables[i, j] = rest[k].copy()
    for node in model.nodes:
        least = float(model.unary[node].min())
        if least != 0:
            model.unary[node] = model.unary[node] - least
            model.constant += least


def fold_single(model: Model) -> None:
    """Nodes with one strategy leave; their usage moves to the limits."""
    for node in model.nodes:
        if len(model.unary[node]) > 1:
            continue
        for other in sorted(model.near[node]):
            model.unary[other] = model.unary[other] + model.table(node, other)[0]
            model.drop_table(node, other)
        for term in model.terms[node]:
            model.limits[term.begin : term.end] -= term.amount[0]
        model.constant += float(model.unary[node][0])
        only, none = model.keep[node], np.zeros(0, dtype=np.int64)
        model.undo.append(Follow(node, node, none, only))
        model.remove(node)


def follow(model: Model) -> None:
    """Merge nodes that a neighbour determines, smallest growth of the tables first."""
    candidates = []
    for pairs, tables in stacks(model, model.take_stale("follow")):
        legal = np.isfinite(tables)
        candidates += [pairs[k] for k in np.flatnonzero((legal.sum(axis=2) == 1).all(axis=1))]
        candidates += [pairs[k][::-1] for k in np.flatnonzero((legal.sum(axis=1) == 1).all(axis=1))]
    todo = sorted(candidates)
    while todo:
        later = []
        for leader, node in todo:
            if not (model.alive[leader] and model.alive[node] and node in model.near[leader]):
                continue
            image = _image(model.table(leader, node))
            if image is None or not _pays(model, leader, node):
                continue
            touched = _merge(model, leader, node, image)
            later += [(leader, other) for other in touched] + [(other, leader) for other in touched]
        todo = sorted(set(later))


def _image(table: Array) -> Integers | None:
    """The one legal partner of each row, or None."""
    legal = np.isfinite(table)
    return np.argmax(legal, axis=1) if np.all(legal.sum(axis=1) == 1) else None


def _pays(model: Model, leader: int, node: int) -> bool:
    """Whether a merge enlarges the tables by at most `GROWTH` entries."""
    large, small = len(model.unary[leader]), len(model.unary[node])
    growth = -large * small
    for other in model.near[node]:
        if other != leader:
            is_new = other not in model.near[leader]
            growth += len(model.unary[other]) * ((large if is_new else 0) - small)
    return growth <= GROWTH


def _merge(model: Model, leader: int, node: int, image: Integers) -> list[int]:
    """Returns the neighbours that the leader got."""
    cost = model.table(leader, node)[np.arange(len(image)), image] + model.unary[node][image]
    model.unary[leader] = model.unary[leader] + cost
    model.terms[leader] = model.terms[leader] + [Term(t.begin, t.end, t.amount[image]) for t in model.terms[node]]
    model.undo.append(Follow(node, leader, model.keep[leader], model.keep[node][image]))
    model.drop_table(leader, node)
    touched = sorted(model.near[node])
    for other in touched:
        moved = np.ascontiguousarray(model.table(node, other)[image])
        model.drop_table(node, other)
        model.add_table(leader, other, moved)
    model.remove(node)
    return touched


def dominate(model: Model) -> None:
    """Delete dominated strategies of the dirty nodes, all against the tables as they are now."""
    todo = [node for node in sorted(model.dirty) if model.alive[node] and len(model.unary[node]) > 1]
    model.dirty.clear()
    excess = {node: model.unary[node][:, None] - model.unary[node][None, :] for node in todo}
    wanted = set(todo)
    incident = sorted({(min(i, j), max(i, j)) for i in todo for j in model.near[i]})
    for pairs, tables in stacks(model, incident):
        capped = np.where(np.isfinite(tables), tables, BIG)
        for side, stack in ((0, capped), (1, capped.transpose(0, 2, 1))):
            members = [k for k, pair in enumerate(pairs) if pair[side] in wanted]
            if members:
                for k, worst in zip(members, _largest_increase(stack[members]), strict=True):
                    excess[pairs[k][side]] += worst
    doomed = {}
    for node in todo:
        better = excess[node] <= 0  # [p', p]
        for used in segments(model.terms[node]) if model.terms[node] else ():
            better &= used[:, None] <= used[None, :]
        np.fill_diagonal(better, False)
        if better.any():
            tie = better & better.T
            keep = ~(better & ~(tie & np.tri(len(better), dtype=bool))).any(axis=0)
            doomed[node] = keep
    for node, keep in doomed.items():
        _restrict(model, node, keep)


def _largest_increase(tables: Array) -> Array:
    """[tables, p', p]: max over q of tables[p', q] - tables[p, q]."""
    count, size, width = tables.shape
    step = max(1, STACK // (count * size * width))
    parts = [
        (tables[:, k : k + step, None, :] - tables[:, None, :, :]).max(axis=3) for k in range(0, size, step)
    ]  # fmt: skip
    return np.concatenate(parts, axis=1)


def eliminate(model: Model) -> None:
    """Min-plus elimination of nodes in no row; see the module docstring."""
    nodes, network = model.network()
    sizes = tuple(len(cost) for cost in network.unary)
    candidates = [_may_leave(model, node) for node in nodes]
    if not any(candidates):
        return
    plan = make_plan(sizes, sorted(network.pairs), LARGEST_BUCKET, max_scope=2, candidates=candidates)
    if not plan.steps:
        return
    run = run_plan(plan, network)
    if not np.isfinite(run.value):
        raise InfeasibleModelError("no legal choice")
    model.undo.append(Eliminated(nodes, tuple(model.keep[node] for node in nodes), run))
    model.constant += run.value
    core = core_network(run)
    for step in plan.steps:
        node = nodes[step.node]
        for other in sorted(model.near[node]):
            model.drop_table(node, other)
        model.remove(node)
    for k, cost in zip(plan.core, core.unary, strict=True):
        model.unary[nodes[k]] = cost
    for (i, j), table in core.pairs.items():
        a, b = nodes[plan.core[i]], nodes[plan.core[j]]
        if (a, b) not in model.tables:
            model.add_table(a, b, table)
        elif model.tables[a, b] is not table:
            model.replace_table(a, b, table)


def _may_leave(model: Model, node: int) -> bool:
    """In no row, and few neighbours that are already joined or small."""
    near = sorted(model.near[node])
    if model.terms[node] or len(near) > 2:
        return False
    if len(near) < 2 or near[1] in model.near[near[0]]:
        return True
    own, first, second = (len(model.unary[i]) for i in (node, *near))
    return first * second <= max(GROWTH, own * (first + second))
