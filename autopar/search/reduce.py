"""Exact elimination of pairwise cost-function networks by min-plus algebra.

    minimise  sum_i c_i[p_i] + sum_(i,j) r_ij[p_i, p_j]

Eliminating node v with neighbours N replaces every factor that mentions v by one table over N,

    m_v[q_N] = min_p ( c_v[p] + sum of factors at (p, q_N) ),

with the minimising p kept for back-substitution. Nodes leave in min-fill-size order (smallest resulting table first,
ties by index) while the table stays under a cap; sharding graphs are near-trees, so normally all do. The order
depends on the structure alone and is made once (`Plan`), then run for any weights.

`min_marginals` runs the second pass over the same tables and gives, for every strategy, the least total cost of an
assignment that uses it: strategies above an incumbent can be fixed out.

Where the cap stops elimination a core of nodes remains; `Elimination.core` is that network, to be solved by `ilp`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array

Scope = tuple[int, ...]
View = tuple[tuple[int, ...] | None, tuple[int, ...]]
"""Order of axes (None: as they are), then shape: of a table that is to broadcast over others."""


@dataclass(frozen=True)
class Network:
    """`unary[i]` costs of node i; `pairs[i, j]` with i < j has shape [choices of i, choices of j]. inf forbids."""

    unary: tuple[Array, ...]
    pairs: Mapping[tuple[int, int], Array]

    def value(self, choice: Sequence[int]) -> float:
        total = sum(float(cost[p]) for cost, p in zip(self.unary, choice, strict=True))
        return total + sum(float(cost[choice[i], choice[j]]) for (i, j), cost in self.pairs.items())


@dataclass(frozen=True)
class Step:
    """Eliminate `node`, leaving a message over `scope` (sorted). `pairs` and `messages` are the factors consumed.

    `pair_views` and `message_views` say how each factor is laid over (node, *scope).
    """

    node: int
    scope: Scope
    pairs: tuple[tuple[int, int], ...]
    messages: tuple[int, ...]
    shape: tuple[int, ...]
    pair_views: tuple[View, ...]
    message_views: tuple[View, ...]


@dataclass(frozen=True)
class Plan:
    """Elimination order of a structure. `core` are the nodes that stay; `core_messages` the steps whose messages do."""

    sizes: tuple[int, ...]
    steps: tuple[Step, ...]
    core: tuple[int, ...]
    core_messages: tuple[int, ...]


@dataclass(frozen=True)
class Elimination:
    """Result of one run.

    Attributes:
        value: optimum (inf if none); with a core, the core's part is missing and `choice` is None.
        choice: an optimal strategy per node, or None.
        messages: per step the table over its scope, after minimisation.
        plan, network: what was run.
    """

    value: float
    choice: tuple[int, ...] | None
    messages: tuple[Array, ...]
    plan: Plan
    network: Network


def make_plan(
    sizes: tuple[int, ...],
    pairs: Sequence[tuple[int, int]],
    cap: int,
    max_scope: int = 64,
    candidates: Sequence[bool] | None = None,
) -> Plan:
    """Min-size elimination order over the structure given by `pairs`.

    Args:
        sizes: strategies per node.
        pairs: sorted node pairs that share a factor.
        cap: largest table made, entries.
        max_scope: most neighbours of an eliminated node.
        candidates: which nodes may be eliminated; None: all.
    """
    neighbours: list[set[int]] = [set() for _ in sizes]
    for i, j in pairs:
        neighbours[i].add(j)
        neighbours[j].add(i)
    incident: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for pair in pairs:
        incident[pair[0]].append(pair)
        incident[pair[1]].append(pair)
    held: list[list[int]] = [[] for _ in sizes]
    message_scope: list[Scope] = []
    used_pairs: set[tuple[int, int]] = set()
    spent: set[int] = set()
    gone = [False] * len(sizes)
    heap = [(_table_size(sizes, neighbours, v), v) for v in range(len(sizes))]
    heapq.heapify(heap)
    steps: list[Step] = []
    while heap:
        size, v = heapq.heappop(heap)
        if gone[v] or size != _table_size(sizes, neighbours, v) or (candidates is not None and not candidates[v]):
            continue
        if size > cap or len(neighbours[v]) > max_scope:
            continue
        own_pairs = tuple(p for p in incident[v] if p not in used_pairs)
        own_messages = tuple(m for m in held[v] if m not in spent)
        used_pairs.update(own_pairs)
        spent.update(own_messages)
        scope = tuple(sorted(neighbours[v]))
        steps.append(_step(sizes, v, scope, own_pairs, (own_messages, message_scope)))
        message_scope.append(scope)
        gone[v] = True
        for u in scope:
            held[u].append(len(steps) - 1)
            neighbours[u].discard(v)
            neighbours[u].update(w for w in scope if w != u)
        for u in scope:
            heapq.heappush(heap, (_table_size(sizes, neighbours, u), u))
    core = tuple(v for v in range(len(sizes)) if not gone[v])
    alive = tuple(m for m, scope in enumerate(message_scope) if m not in spent and scope)
    return Plan(sizes, tuple(steps), core, alive)


def _step(
    sizes: Sequence[int],
    node: int,
    scope: Scope,
    pairs: tuple[tuple[int, int], ...],
    found: tuple[tuple[int, ...], Sequence[Scope]],
) -> Step:
    """A step and how its factors are laid out; `found` are its messages and the scopes of all messages so far."""
    target, (messages, scopes) = (node, *scope), found
    return Step(
        node,
        scope,
        pairs,
        messages,
        tuple(sizes[u] for u in target),
        tuple(_view(sizes, pair, target) for pair in pairs),
        tuple(_view(sizes, scopes[m], target) for m in messages),
    )


def _table_size(sizes: Sequence[int], neighbours: Sequence[set[int]], v: int) -> int:
    return sizes[v] * math.prod(sizes[u] for u in neighbours[v])


def _view(sizes: Sequence[int], scope: Scope, target: Scope) -> View:
    """How a table over `scope` (a subsequence of `target` up to order) is laid over `target`."""
    order = tuple(sorted(range(len(scope)), key=lambda k: target.index(scope[k])))
    present = set(scope)
    shape = tuple(sizes[u] if u in present else 1 for u in target)
    return (None if order == tuple(range(len(scope))) else order), shape


def _laid(table: Array, view: View) -> Array:
    order, shape = view
    return (table if order is None else table.transpose(order)).reshape(shape)


def _bucket(plan: Plan, network: Network, index: int, messages: Sequence[Array]) -> Array:
    """Sum of all factors of step `index`, over (node, *scope)."""
    step = plan.steps[index]
    total = network.unary[step.node].reshape((-1,) + (1,) * len(step.scope))
    for pair, view in zip(step.pairs, step.pair_views, strict=True):
        total = total + _laid(network.pairs[pair], view)
    for m, view in zip(step.messages, step.message_views, strict=True):
        total = total + _laid(messages[m], view)
    return total if total.shape == step.shape else np.broadcast_to(total, step.shape)


def run_plan(plan: Plan, network: Network, *, choose: bool = True) -> Elimination:
    """Eliminate in the plan's order. Ties go to the lowest index, so the result is deterministic.

    Without `choose` the optimum's value is all that is found.
    """
    messages: list[Array] = []
    constant = 0.0
    for index, step in enumerate(plan.steps):
        message = _bucket(plan, network, index, messages).min(axis=0)
        messages.append(message)
        if not step.scope:
            constant += float(message)
    run = Elimination(constant, None, tuple(messages), plan, network)
    if plan.core or not choose or not math.isfinite(constant):
        return run
    return replace(run, choice=back_substitute(run, [0] * len(plan.sizes)))


def back_substitute(run: Elimination, choice: list[int]) -> tuple[int, ...]:
    """Best strategies of the eliminated nodes, given those of the core already set in `choice`."""
    for step in reversed(run.plan.steps):
        v = step.node
        column = run.network.unary[v]
        for i, j in step.pairs:
            table = run.network.pairs[i, j]
            column = column + (table[:, choice[j]] if i == v else table[choice[i]])
        for m in step.messages:
            scope = run.plan.steps[m].scope
            column = column + run.messages[m][tuple(slice(None) if u == v else choice[u] for u in scope)]
        choice[v] = int(np.argmin(column))
    return tuple(choice)


def core_network(run: Elimination) -> Network:
    """What remains after a run with max_scope 2, nodes renumbered by their position in the core."""
    position = {v: k for k, v in enumerate(run.plan.core)}
    unary = [run.network.unary[v].copy() for v in run.plan.core]
    pairs = {
        (position[i], position[j]): table.copy()
        for (i, j), table in run.network.pairs.items()
        if i in position and j in position
    }
    for m in run.plan.core_messages:
        scope = tuple(position[v] for v in run.plan.steps[m].scope)
        table = run.messages[m]
        if len(scope) == 1:
            unary[scope[0]] = unary[scope[0]] + table
        else:
            pair = (scope[0], scope[1])
            pairs[pair] = pairs[pair] + table if pair in pairs else table
    return Network(tuple(unary), pairs)


def min_marginals(run: Elimination) -> tuple[Array, ...]:
    """Per node and strategy: least total cost of an assignment that uses it (inf if none). Needs an empty core."""
    plan = run.plan
    step_of = {step.node: k for k, step in enumerate(plan.steps)}
    down: dict[int, Array] = {}
    result: list[Array] = [np.zeros(0)] * len(plan.sizes)
    children: dict[int, list[int]] = {}
    for k, step in enumerate(plan.steps):
        if step.scope:
            children.setdefault(min(step_of[u] for u in step.scope), []).append(k)
    for k in range(len(plan.steps) - 1, -1, -1):
        step = plan.steps[k]
        if step.scope:
            belief = _bucket(plan, run.network, k, run.messages) + down.pop(k)[None]
        else:
            belief = _bucket(plan, run.network, k, run.messages) + (run.value - float(run.messages[k]))
        target = (step.node, *step.scope)
        result[step.node] = belief.min(axis=tuple(range(1, len(target))))
        for child in children.get(k, ()):
            scope = plan.steps[child].scope
            away = tuple(axis for axis, v in enumerate(target) if v not in scope)
            table = belief.min(axis=away) if away else belief
            left = tuple(v for v in target if v in scope)
            table = table.transpose([left.index(v) for v in scope])
            message = run.messages[child]
            finite = np.isfinite(message)
            down[child] = np.where(finite, table - np.where(finite, message, 0.0), np.inf)
    return tuple(result)


def restrict(network: Network, keep: Sequence[NDArray[np.int64]]) -> Network:
    """Network with only the listed strategies of every node."""
    unary = tuple(cost[k] for cost, k in zip(network.unary, keep, strict=True))
    return Network(unary, {(i, j): t[np.ix_(keep[i], keep[j])] for (i, j), t in network.pairs.items()})
