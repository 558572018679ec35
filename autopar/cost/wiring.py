"""Wiring: what nodes look like to each other under one set of active axes, and the prices of their redistributions.

Which choices of a node remain depends on sizes, but only few sets of them occur: each is a `Form`, made once. Edges
depend on the forms of both ends alone, so the index arrays that expand pair prices into edge prices are kept too, and
a mesh only fills in numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autopar.cost.layouts import CODES, Codes, Mask, sharding_ids, sharding_of
from autopar.cost.shards import ShardRows, Sizes, Tensors, shard_rows
from autopar.cost.sheets import Kept, OpSheet, ParameterSheet
from autopar.cost.skeleton import Skeleton
from autopar.cost.transfers import Transfers
from autopar.ir.cost import Array
from autopar.ir.graph import Op, OpGraph

KEPT_WIRINGS = 16

Index = NDArray[np.int64]
Key: TypeAlias = tuple[object, ...]


@dataclass(frozen=True)
class Form:
    """A node with the choices that remain: `outgoing[slot]`, `incoming[slot]` are sharding ids per choice."""

    number: int
    choices: tuple[Any, ...]
    outgoing: tuple[Codes, ...]
    incoming: tuple[Codes, ...]


@dataclass(frozen=True)
class EdgeForm:
    """Pair numbers of the distinct shardings of both ends, and where each pair of choices finds its own.

    `again` marks pairs whose redistribution an earlier operand of the same op has paid, or is None.
    """

    numbers: Index
    expand: Index
    again: Mask | None


@dataclass(frozen=True)
class Wiring:
    """All edges of one combination of forms, flat: Q distinct pairs, P pairs of choices.

    Attributes:
        numbers: [Q] pair numbers (see `Transfers`); `starts` where each edge's begin.
        edge: [Q], edge of each.
        expand: [P] into Q; `offsets` is [edges + 1].
        again: positions in P that are paid already.
    """

    numbers: Index
    starts: Index
    edge: Index
    expand: Index
    offsets: tuple[int, ...]
    again: Index


@dataclass(frozen=True)
class _Candidates:
    """Placements that a hub could take before sizes are looked at."""

    ids: Codes
    rows: ShardRows


@dataclass
class Frame:
    """Everything of a graph's tables that depends on which axes are active, and nothing that depends on sizes."""

    graph: OpGraph
    skeleton: Skeleton
    tensors: Tensors
    transfers: Transfers
    op_nodes: tuple[int, ...]
    op_list: tuple[Op, ...]
    parameter_nodes: tuple[int, ...]
    ops: OpSheet
    parameters: ParameterSheet | None
    gathering: Index
    _forms: dict[Key, Form] = field(default_factory=dict)
    _candidates: dict[tuple[int, tuple[int, ...]], _Candidates] = field(default_factory=dict)
    _edges: dict[tuple[int, int, int], EdgeForm] = field(default_factory=dict)
    _wirings: dict[tuple[int, ...], Wiring] = field(default_factory=dict)
    _rows: dict[tuple[int, int, int], ShardRows] = field(default_factory=dict)

    def forms(self, ops: Kept, parameters: Kept | None, sizes: Sizes, axis_sizes: tuple[int, ...]) -> list[Form]:
        """The form of every node of the skeleton."""
        found: list[Form | None] = [None] * len(self.skeleton.nodes)
        for i, (node, key) in enumerate(zip(self.op_nodes, ops.keys, strict=True)):
            found[node] = self._forms.get((node, key)) or self._op_form(node, i, key)
        if parameters is not None:
            for i, (node, key) in enumerate(zip(self.parameter_nodes, parameters.keys, strict=True)):
                found[node] = self._forms.get((node, key)) or self._parameter_form(node, i, key)
        neighbours = self.skeleton.hub_neighbours
        for node in self.skeleton.hubs:
            seen = [(form, slot, out) for other, slot, out in neighbours[node] if (form := found[other]) is not None]
            found[node] = self._hub_form(node, seen, sizes, axis_sizes)
        return [form for form in found if form is not None]

    def _add_form(
        self,
        key: Key,
        choices: tuple[Any, ...],
        outgoing: tuple[Codes, ...],
        incoming: tuple[Codes, ...],
    ) -> Form:
        form = self._forms[key] = Form(len(self._forms), choices, outgoing, incoming)
        return form

    def _op_form(self, node: int, op: int, key: bytes) -> Form:
        choices = self.ops.choices[op]
        slots = self.ops.slot_ids(op, key)
        split = len(choices.inputs)
        return self._add_form((node, key), _chosen(choices.grid.choices, key), slots[split:], slots[:split])

    def _parameter_form(self, node: int, parameter: int, key: bytes) -> Form:
        sheet = self.parameters
        assert sheet is not None
        span = slice(int(sheet.owners.offsets[parameter]), int(sheet.owners.offsets[parameter + 1]))
        exposed = sheet.exposed_ids[span][np.frombuffer(key, dtype=np.bool_)]
        return self._add_form((node, key), _chosen(sheet.choices[parameter].grid.choices, key), (exposed,), ())

    def _hub_form(
        self, node: int, seen: list[tuple[Form, int, bool]], sizes: Sizes, axis_sizes: tuple[int, ...]
    ) -> Form:
        """A hub may take every placement that its producer makes or a consumer accepts, axis by axis."""
        around = tuple(form.number for form, _, _ in seen)
        if (node, around) not in self._candidates:
            ids = [(form.outgoing if out else form.incoming)[slot] for form, slot, out in seen]
            self._candidates[node, around] = self._hub_candidates(node, ids, len(axis_sizes))
        candidates = self._candidates[node, around]
        even = candidates.rows.parts(sizes, axis_sizes)[1]
        key = (node, around, even.tobytes())
        if key in self._forms:
            return self._forms[key]
        placed = candidates.ids[even]
        choices = tuple(sharding_of(i, len(axis_sizes)) for i in placed.tolist())
        return self._add_form(key, choices, (placed,), (placed,))

    def _hub_candidates(self, node: int, seen: list[Codes], num_axes: int) -> _Candidates:
        codes = np.zeros((1, num_axes), dtype=np.int64)
        if seen:
            found = codes_of(np.unique(np.concatenate(seen)), num_axes)
            per_axis = [np.unique(found[:, axis]).tolist() for axis in range(num_axes)]
            rows = list(itertools.product(*per_axis))
            codes = np.array(rows, dtype=np.int64).reshape(len(rows), num_axes)
        return _Candidates(sharding_ids(codes), self._shard_rows(self.skeleton.nodes[node].representative, codes))

    def _shard_rows(self, value: str, codes: Codes) -> ShardRows:
        tensor = np.full(len(codes), self.tensors.index[value], dtype=np.int64)
        return shard_rows(tensor, codes, self.tensors.width)

    def local_bytes(self, value: str, form: Form, slot: int, sizes: Sizes, axis_sizes: tuple[int, ...]) -> Array:
        """Bytes on one device of a value that leaves a node in `slot`, per choice."""
        row = self.tensors.index[value]
        key = (form.number, slot, row)
        if key not in self._rows:
            self._rows[key] = self._shard_rows(value, codes_of(form.outgoing[slot], len(axis_sizes)))
        local: Array = sizes.num_bytes[row] / self._rows[key].parts(sizes, axis_sizes)[0]
        return local

    def wiring(self, forms: Sequence[Form]) -> Wiring:
        """All edges between nodes of these forms."""
        key = tuple(form.number for form in forms)
        if key not in self._wirings:
            while len(self._wirings) >= KEPT_WIRINGS:
                self._wirings.pop(next(iter(self._wirings)))
            edges = self.skeleton.edges
            self._wirings[key] = _join([self._edge(i, forms[e.source], forms[e.target]) for i, e in enumerate(edges)])
        return self._wirings[key]

    def _edge(self, index: int, source: Form, target: Form) -> EdgeForm:
        key = (index, source.number, target.number)
        if key not in self._edges:
            edge = self.skeleton.edges[index]
            sources, of_source = np.unique(source.outgoing[edge.source_slot], return_inverse=True)
            targets, of_target = np.unique(target.incoming[edge.target_slot], return_inverse=True)
            numbers = self.transfers.matrix(sources, targets, self.graph.values[edge.value].requires_grad)
            again = None
            if edge.earlier_slots:
                same = [target.incoming[slot] == target.incoming[edge.target_slot] for slot in edge.earlier_slots]
                again = np.broadcast_to(np.any(same, axis=0), (len(of_source), len(of_target))).reshape(-1)
            expand = (of_source[:, None] * len(targets) + of_target[None, :]).reshape(-1)
            self._edges[key] = EdgeForm(numbers.reshape(-1), expand, again)
        return self._edges[key]


def _join(edges: Sequence[EdgeForm]) -> Wiring:
    if not edges:
        nothing = np.zeros(0, dtype=np.int64)
        return Wiring(nothing, nothing, nothing, nothing, (0,), nothing)
    counts = np.array([len(edge.numbers) for edge in edges], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    offsets = np.concatenate([[0], np.cumsum([len(edge.expand) for edge in edges])])
    again = [
        np.flatnonzero(edge.again) + offset
        for edge, offset in zip(edges, offsets[:-1], strict=True)
        if edge.again is not None
    ]
    return Wiring(
        np.concatenate([edge.numbers for edge in edges]),
        starts,
        np.repeat(np.arange(len(edges)), counts),
        np.concatenate([edge.expand + start for edge, start in zip(edges, starts, strict=True)]),
        tuple(offsets.tolist()),
        np.concatenate(again) if again else np.zeros(0, dtype=np.int64),
    )


def _chosen(choices: tuple[Any, ...], key: bytes) -> tuple[Any, ...]:
    return tuple(choice for choice, kept in zip(choices, key, strict=True) if kept)


def codes_of(ids: Codes, num_axes: int) -> Codes:
    """[row, axis] placement codes; inverse of `sharding_ids`."""
    powers = CODES ** np.arange(num_axes - 1, -1, -1, dtype=np.int64)
    codes: Codes = ids[:, None] // powers % CODES
    return codes
