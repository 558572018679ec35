"""Down-sets ("ideals") of the contracted graph and the load of the difference of two of them, for blocks of pairs.

For a net with units e let t(I) = |e & I|. The difference S = J - I of ideals I within J cuts it iff
0 < t(J) - t(I) < |e|:

    t(I) = 0      cut iff 0 < t(J) < |e|
    0 < t(I)<|e|  cut iff t(J) != t(I)
    t(I) = |e|    never

So the transfers of S are border(J), the cost of all nets with 0 < t(J) < |e|, corrected for the few nets that are
partial at I: minus the net's cost where t(J) = t(I), plus it where t(J) = |e|. For a block of pairs that is a product
of two small matrices.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.partition.contract import Contracted

WORD_BITS = 64
SEED = 1


@dataclass(frozen=True)
class IdealTable:
    """Ideals in ascending order of accelerator time; `empty` and `full` index the extreme ones.

    `members`: bit sets, one row of 64-bit words per ideal; the sums run over the ideal's units; `counts[i, e]`: units
    of net e inside ideal i; `border_s`: cost of the nets that the ideal cuts; `num_cpu_only`: units that need a CPU.
    """

    masks: tuple[int, ...]
    empty: int
    full: int
    members: NDArray[np.uint64]
    accelerator_s: Array
    cpu_s: Array
    size_bytes: Array
    num_cpu_only: NDArray[np.int64]
    counts: NDArray[np.int16]
    net_sizes: NDArray[np.int16]
    net_costs_s: Array
    border_s: Array

    def __len__(self) -> int:
        return len(self.masks)

    def loads_s(self, rows: NDArray[np.int64], columns: NDArray[np.int64], memory_bytes: float) -> Array:
        """Accelerator load of J - I for I in rows, J in columns; infinite where not possible."""
        loads = (self.accelerator_s + self.border_s)[columns][None, :] - self.accelerator_s[rows][:, None]
        before = self.counts[rows]
        is_partial = (before > 0) & (before < self.net_sizes)
        nets = np.flatnonzero(is_partial.any(axis=0))
        if len(nets):
            loads += self._corrections_s(nets, before, is_partial, columns)
        np.maximum(loads, 0.0, out=loads)
        bad = self.outside(rows, columns)
        if np.isfinite(memory_bytes):
            bad |= self.size_bytes[columns][None, :] - self.size_bytes[rows][:, None] > memory_bytes
        if self.num_cpu_only[self.full]:
            bad |= self.num_cpu_only[columns][None, :] != self.num_cpu_only[rows][:, None]
        loads[bad] = np.inf
        return loads

    def _corrections_s(
        self,
        nets: NDArray[np.int64],
        before: NDArray[np.int16],
        is_partial: NDArray[np.bool_],
        columns: NDArray[np.int64],
    ) -> Array:
        left, right = [], []
        for net in nets:
            after = self.counts[columns, net]
            is_full = after == self.net_sizes[net]
            for count in np.unique(before[is_partial[:, net], net]):
                left.append(before[:, net] == count)
                right.append(self.net_costs_s[net] * (is_full.astype(np.float64) - (after == count)))
        return np.asarray(np.stack(left, axis=1).astype(np.float64) @ np.stack(right))

    def cpu_loads_s(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """CPU time of J - I for I in rows, J in columns; infinite where I is not within J."""
        loads = np.maximum(self.cpu_s[columns][None, :] - self.cpu_s[rows][:, None], 0.0)
        loads[self.outside(rows, columns)] = np.inf
        return loads

    def outside(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the ideal of the row is not a subset of that of the column."""
        result = np.zeros((len(rows), len(columns)), dtype=np.bool_)
        for word in range(self.members.shape[1]):
            inner, outer = self.members[rows, word], ~self.members[columns, word]
            if np.bitwise_or.reduce(inner) & np.bitwise_or.reduce(outer):
                result |= (inner[:, None] & outer[None, :]) != 0
        return result


def list_ideals(graph: Contracted, limit: int) -> list[int] | None:
    """All ideals as integers whose bit i says that unit i is inside, or None if there are more than `limit`."""
    needs = [sum(1 << p for p in before) for before in graph.predecessors]
    users: list[list[int]] = [[] for _ in needs]
    for unit, before in enumerate(graph.predecessors):
        for p in before:
            users[p].append(unit)
    roots = sum(1 << unit for unit, before in enumerate(graph.predecessors) if not before)
    seen = {0}
    stack = [(0, roots)]
    while stack:
        ideal, ready = stack.pop()
        rest = ready
        while rest:
            bit = rest & -rest
            rest ^= bit
            larger = ideal | bit
            if larger in seen:
                continue
            if len(seen) >= limit:
                return None
            seen.add(larger)
            freed = (1 << user for user in users[bit.bit_length() - 1] if needs[user] & ~larger == 0)
            stack.append((larger, (ready ^ bit) | sum(freed)))
    return sorted(seen)


def prefixes(graph: Contracted, num_random_orders: int) -> Iterator[int]:
    """Ideals that are prefixes of a few topological orders: a family in which every chain is a contiguous partition."""
    count = len(graph.units)
    generator = np.random.default_rng(SEED)
    ascending = np.arange(count)
    priorities = [ascending, -ascending, *(generator.permutation(count) for _ in range(num_random_orders))]
    users: list[list[int]] = [[] for _ in range(count)]
    for unit, before in enumerate(graph.predecessors):
        for p in before:
            users[p].append(unit)
    for is_deep in (False, True):
        for priority in priorities:
            yield from _prefixes_of_order(graph, users, priority, is_deep)


def _prefixes_of_order(
    graph: Contracted, users: list[list[int]], priority: NDArray[np.int64], is_deep: bool
) -> Iterator[int]:
    """Prefixes of the order by least priority number, or, if deep, by latest freed and then by priority."""
    waiting = [len(before) for before in graph.predecessors]
    ready = [(0, int(priority[unit]), unit) for unit in range(len(waiting)) if not waiting[unit]]
    heapq.heapify(ready)
    ideal, taken = 0, 0
    yield ideal
    while ready:
        unit = heapq.heappop(ready)[2]
        ideal |= 1 << unit
        taken += 1
        yield ideal
        for user in users[unit]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (-taken if is_deep else 0, int(priority[user]), user))


def tabulate(graph: Contracted, ideals: Iterable[int]) -> IdealTable:
    """The table of the given ideals, which include the empty and the full one."""
    masks = sorted(set(ideals))
    num_units = len(graph.units)
    num_words = max(1, -(-num_units // WORD_BITS))
    raw = b"".join(mask.to_bytes(num_words * 8, "little") for mask in masks)
    octets = np.frombuffer(raw, dtype=np.uint8).reshape(len(masks), num_words * 8)
    inside = np.unpackbits(octets, axis=1, bitorder="little", count=num_units)
    accelerator_s = inside @ np.array([u.accelerator_s or 0.0 for u in graph.units])
    sizes = inside.sum(axis=1)
    order = np.lexsort((sizes, accelerator_s))
    inside, octets = inside[order], np.ascontiguousarray(octets[order])
    costs_s = np.array([cost for _, cost in graph.nets], dtype=np.float64)
    counts = np.zeros((len(masks), len(graph.nets)), dtype=np.int16)
    for index, (units, _) in enumerate(graph.nets):
        counts[:, index] = inside[:, list(units)].sum(axis=1)
    net_sizes = np.array([len(units) for units, _ in graph.nets], dtype=np.int16)
    return IdealTable(
        tuple(masks[i] for i in order),
        int(np.argmin(sizes[order])),
        int(np.argmax(sizes[order])),
        octets.view(np.uint64),
        accelerator_s[order],
        inside @ np.array([u.cpu_s for u in graph.units]),
        inside @ np.array([u.size_bytes for u in graph.units]),
        (inside @ np.array([u.accelerator_s is None for u in graph.units], dtype=np.int64)).astype(np.int64),
        counts,
        net_sizes,
        costs_s,
        ((counts > 0) & (counts < net_sizes)) @ costs_s,
    )
