"""Sheets: all choices of all ops, and of all parameters, under one set of active axes, as flat arrays.

A sheet depends on the graph, the pins and on which axes are longer than 1; `pricing` fills in sizes. Choices stand
op after op; the rows of one choice (its operands, then its results) stand together, so sums over operands and results
are `reduceat` over rows, and no op is visited by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cost.choices import OpChoices, ParameterChoices, Preference, keep
from autopar.cost.kernels import is_view, matrix_operands, work_kind
from autopar.cost.layouts import REPLICATE_CODE, Codes, Mask, sharding_ids
from autopar.cost.moves import Moves
from autopar.cost.recompute import Again, Reruns, make_reruns
from autopar.cost.shards import ShardRows, Sizes, Tensors, shard_rows
from autopar.ir.cost import Array
from autopar.ir.graph import Op, Value
from autopar.ir.tensor import BYTES_BY_DTYPE
from autopar.rules.contractions import CONTEXT
from autopar.rules.experts import exchanged_values


@dataclass(frozen=True)
class Kept:
    """Choices of a sheet that remain at given sizes.

    Attributes:
        choices: positions in the sheet.
        owner: [kept], op or parameter of each.
        starts: [owners + 1], where each owner's begin.
        parts: [all rows], into how many parts each row cuts its tensor.
        keys: per owner, which of its choices remain, as bytes.
    """

    choices: Codes
    owner: Codes
    starts: Codes
    parts: Array
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Owners:
    """Choices by owner: `offsets` is [owners + 1], `preferences` those of the owners that have any."""

    offsets: Codes
    preferences: Mapping[int, tuple[Preference, ...]]

    def keep(self, even: Mask, parts: Array) -> Kept:
        """Applies preferences to the choices that divide evenly."""
        for owner, preferences in self.preferences.items():
            span = slice(self.offsets[owner], self.offsets[owner + 1])
            even[span] = keep(even[span], preferences)
        count = np.add.reduceat(even.astype(np.int64), self.offsets[:-1]) if len(self.offsets) > 1 else self.offsets[1:]
        packed, bounds = even.tobytes(), self.offsets.tolist()
        return Kept(
            np.flatnonzero(even),
            np.repeat(np.arange(len(count)), count),
            np.concatenate([[0], np.cumsum(count)]),
            parts,
            tuple(packed[start:stop] for start, stop in itertools.pairwise(bounds)),
        )


def _owners(counts: Sequence[int], preferences: Sequence[tuple[Preference, ...]]) -> Owners:
    return Owners(
        np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.int64))]).astype(np.int64),
        {owner: found for owner, found in enumerate(preferences) if found},
    )


@dataclass(frozen=True)
class OpFacts:
    """What pricing must know of each op, whatever its choices. Arrays are [op] unless stated.

    Attributes:
        kinds: (kind of work, dtype) -> ops of it.
        is_view, has_backward, has_batch: has_batch says that the op's figures divide by the microbatches.
        keeps: it leaves what it saves until its backward, or where nothing is trained until the end of the step.
        forward_kernels, backward_kernels: launches.
        flops_forward, flops_backward, saved_extra_bytes: of the whole batch.
        inner: (op, tensor) for the values inside a region op.
        inner_passes: [op, 2], how often forward and backward move those.
        matrices: ops that are one GEMM.
        matrix_slots: [matrix op, 3], of operands A, B and result C = A B among operands and results.
        matrix_items: [matrix op, 3], bytes of an element of each.
        matrix_wanted: [2, matrix op], 1 where A and where B need a gradient.
        block: or -1.
        whole_saved: (op, tensor) for batch inputs that the op saves, which every rank holds whole, and shared
            values that it makes and others keep alive.
    """

    kinds: Mapping[tuple[str, str], Codes]
    is_view: Mask
    has_backward: Mask
    keeps: Mask
    has_batch: Mask
    forward_kernels: Array
    backward_kernels: Array
    flops_forward: Array
    flops_backward: Array
    saved_extra_bytes: Array
    inner: Codes
    inner_passes: Array
    matrices: Codes
    matrix_slots: Codes
    matrix_items: Array
    matrix_wanted: Array
    block: Codes
    whole_saved: Codes


@dataclass(frozen=True)
class OpSheet:
    """Choices of ops. Weights are [row]; bytes of a row times its weight add up to what the name says.

    Attributes:
        row_starts: [choice], first row.
        rows_per_choice: [op].
        ids: [row], sharding id.
        forward, backward, accumulated: how often forward, backward and the addition to earlier microbatches'
            gradients move it (see `moves`).
        apart: the same three, by kernels of their own.
        joined: what of `apart` in backward adds to an earlier reader's gradient.
        written: results that take memory.
        gradients: operands that need a gradient.
        saved_root: tensor whose storage is kept because of this row, or -1.
        kept_share: share of it that stays until backward.
        copied: [row], how often the row itself is kept beside what is counted otherwise: 1 where its maker keeps the
            value that it was gathered from, or attention reads it whole.
        gathers_again: [row, axis], it stays cut over the axis, and is gathered again for backward.
        reruns: what backward computes again.
        splits_work: [choice, axis].
        is_exchanged: [choice, axis], the op sends its operands to other ranks of the axis and its results back.
        exchanged: (op, tensor, times), what an exchange sends in forward.
    """

    facts: OpFacts
    choices: tuple[OpChoices, ...]
    owners: Owners
    row_starts: Codes
    rows_per_choice: Codes
    rows: ShardRows
    ids: Codes
    forward: Array
    backward: Array
    accumulated: Array
    apart: Array
    joined: Array
    written: Array
    gradients: Array
    saved_root: Codes
    kept_share: Array
    copied: Array
    gathers_again: Mask
    reruns: Reruns
    splits_work: Mask
    is_exchanged: Mask
    exchanged: Codes

    def keep(self, sizes: Sizes, axis_sizes: Sequence[int]) -> Kept:
        """Keeps what divides evenly (never nothing: `replicate` always divides)."""
        parts, even = self.rows.parts(sizes, axis_sizes)
        return self.owners.keep(np.logical_and.reduceat(even, self.row_starts), parts)

    def slot_ids(self, op: int, kept: bytes) -> tuple[Codes, ...]:
        """Sharding ids of every operand and result of one op, over its kept choices."""
        first, last = int(self.owners.offsets[op]), int(self.owners.offsets[op + 1])
        width, start = int(self.rows_per_choice[op]), int(self.row_starts[first])
        block = self.ids[start : start + (last - first) * width].reshape(-1, width)
        return tuple(block[np.frombuffer(kept, dtype=np.bool_)].T)


def make_op_sheet(
    ops: Sequence[Op],
    choices: Sequence[OpChoices],
    tensors: Tensors,
    kept_shared: frozenset[str],
    moves: Mapping[str, Moves],
    *,
    training: bool,
    again: Mapping[str, Again],
    kept_by_makers: frozenset[str] = frozenset(),
    regathers: bool = False,
) -> OpSheet:
    """The sheet of `ops`, whose choices are given in the same order; `kept_shared` as in `skeleton.Skeleton`, `moves`
    by op, `again` as `recompute.recomputed` makes it; `kept_by_makers`: results that the op that makes them keeps for
    its own backward; `regathers`: products keep operands as before they were gathered.
    """
    blocks = [
        _rows_of(op, found, tensors, kept_shared, moves=moves[op.name], again=again.get(op.name), training=training)
        for op, found in zip(ops, choices, strict=True)
    ]
    counts = [len(found.grid.choices) for found in choices]
    widths = np.array([block.width for block in blocks], dtype=np.int64)
    codes = np.concatenate([block.codes for block in blocks])
    weights = np.concatenate([block.weights for block in blocks], axis=1)
    exchanged = [
        (i, tensors.index[name], times)
        for i, found in enumerate(choices)
        if found.is_exchanged.any()
        for name, times in exchanged_values(ops[i], tensors.values)
    ]
    if not training:
        weights[GRADIENTS] = 0.0
    saved_root = np.concatenate([block.saved_root for block in blocks])
    gathered = _gathers_again(ops, choices, widths, codes, tensors)
    beside = gathered.any(axis=1) & _roots_in(kept_by_makers, ops, counts, tensors) & ~np.bool_(regathers)
    attended = _attended(ops, choices, widths, codes, tensors=tensors, again=again)
    return OpSheet(
        facts=_facts(ops, tensors, kept_shared, moves, training=training),
        choices=tuple(choices),
        owners=_owners(counts, [found.preferences for found in choices]),
        row_starts=np.concatenate([[0], np.cumsum(np.repeat(widths, counts))])[:-1],
        rows_per_choice=widths,
        rows=shard_rows(np.concatenate([block.tensor for block in blocks]), codes, tensors.width),
        ids=sharding_ids(codes),
        forward=weights[FORWARD], backward=weights[BACKWARD], accumulated=weights[ACCUMULATED],
        apart=weights[APART : APART + 3], joined=weights[JOINED],
        written=weights[WRITTEN], gradients=weights[GRADIENTS],
        saved_root=saved_root,
        kept_share=np.concatenate([block.kept_share for block in blocks]),
        copied=float(training) * np.where((beside | attended) & (saved_root < 0), 1.0, 0.0)
        + float(training)
        * np.concatenate([_traded(op, found, op.name in again) for op, found in zip(ops, choices, strict=True)]),
        gathers_again=gathered & regathers,
        reruns=make_reruns(ops, again),
        splits_work=np.concatenate([found.splits_work for found in choices]),
        is_exchanged=np.concatenate([found.is_exchanged for found in choices]),
        exchanged=np.array(exchanged, dtype=np.int64).reshape(-1, 3),
    )  # fmt: skip


def _roots_in(names: frozenset[str], ops: Sequence[Op], counts: Sequence[int], tensors: Tensors) -> Mask:
    """[row], the tensor is stored with one of these."""
    slots = ([tensors.values[name].root in names for name in (*op.inputs, *op.outputs)] for op in ops)
    found: Mask = np.concatenate([np.tile(own, count) for own, count in zip(slots, counts, strict=True)])
    return found


def _gathers_again(
    ops: Sequence[Op], choices: Sequence[OpChoices], widths: Codes, codes: Codes, tensors: Tensors
) -> Mask:
    """[row, axis], operands of products with a parameter, whole on an axis on which the choice splits the work."""
    is_product = [
        work_kind(op) == "gemm"
        and not op.members
        and any(tensors.values[name].origin == "parameter" for name in op.inputs)
        for op in ops
    ]
    return _read_whole(is_product, choices, widths, codes)


def _read_whole(are: Sequence[bool], choices: Sequence[OpChoices], widths: Codes, codes: Codes) -> Mask:
    """[row, axis], of these ops, what is whole on an axis on which the choice splits the work."""
    counts = [len(found.grid.choices) for found in choices]
    splits = np.concatenate([np.repeat(c.splits_work, width, axis=0) for c, width in zip(choices, widths, strict=True)])
    found: Mask = np.repeat(np.asarray(are), widths * counts)[:, None] & splits & (codes <= REPLICATE_CODE)
    return found


def _attended(
    ops: Sequence[Op],
    choices: Sequence[OpChoices],
    widths: Codes,
    codes: Codes,
    *,
    tensors: Tensors,
    again: Mapping[str, Again],
) -> Mask:
    """[row], computed values that attention reads whole where its choice splits the work, unless it runs again."""
    is_one = [work_kind(op) == "attention" and op.name not in again for op in ops]
    computed = frozenset(value.name for value in tensors.values.values() if value.origin == "op")
    counts = [len(found.grid.choices) for found in choices]
    found: Mask = _read_whole(is_one, choices, widths, codes).any(axis=1) & _roots_in(computed, ops, counts, tensors)
    return found


def _traded(op: Op, choices: OpChoices, is_rerun: bool) -> Array:
    """[row], shares of operands and results that causal attention over split rows keeps beside what is counted: half
    of the queries and the results of both halves, which are traded with another rank (`program.context`).
    """
    per_slot = np.zeros(len(op.inputs) + len(op.outputs))
    if work_kind(op) == "attention" and not is_rerun:
        per_slot[0], per_slot[len(op.inputs)] = 0.5, 1.0
    splits = [any(axis.label == CONTEXT for axis in choice) for choice in choices.grid.choices]
    return np.outer(splits, per_slot).ravel()


FORWARD, BACKWARD, ACCUMULATED, WRITTEN, GRADIENTS, JOINED, APART = range(7)


@dataclass(frozen=True)
class _Rows:
    width: int
    tensor: Codes
    codes: Codes
    weights: Array
    saved_root: Codes
    kept_share: Array


def _rows_of(
    op: Op, choices: OpChoices, tensors: Tensors, kept_shared: frozenset[str], *, moves: Moves, again: Again | None,
    training: bool,
) -> _Rows:  # fmt: skip
    """Rows of one op, choice after choice."""
    values = tensors.values
    names = (*op.inputs, *op.outputs)
    added, added_apart = moves.accumulated
    rows = (
        moves.forward, moves.backward, added, moves.written, moves.gradients, moves.joined, *moves.apart, added_apart,
    )  # fmt: skip
    weights = np.array([row or (0.0,) * len(names) for row in rows], dtype=np.float64)
    saved, share = np.full(len(names), -1, dtype=np.int64), np.ones(len(names))
    slot_of = {name: slot for slot, name in enumerate(names)}
    for name, part in (dict.fromkeys(moves.saved, 1.0) if again is None else again.kept).items():
        root = values[values[name].root]
        is_split = root.origin == "op" or (root.origin == "input" and not training)
        if is_split and root.name not in kept_shared and name in slot_of:
            saved[slot_of[name]], share[slot_of[name]] = tensors.index[root.name], part
    stacked = np.stack([*choices.inputs, *choices.outputs], axis=1)
    count = len(choices.grid.choices)
    return _Rows(
        len(names),
        np.tile(np.array([tensors.index[name] for name in names], dtype=np.int64), count),
        stacked.reshape(count * len(names), -1),
        np.tile(weights, count),
        np.tile(saved, count),
        np.tile(share, count),
    )


def _facts(
    ops: Sequence[Op], tensors: Tensors, kept_shared: frozenset[str], moves: Mapping[str, Moves], *, training: bool
) -> OpFacts:
    values, dims = tensors.values, tensors.dims
    kinds: dict[tuple[str, str], list[int]] = {}
    inner: list[tuple[int, int]] = []
    whole: list[tuple[int, int]] = []
    own = [moves[op.name] for op in ops]
    backward = np.zeros(len(ops), dtype=np.bool_)
    for i, op in enumerate(ops):
        kind, dtype = work_kind(op), own[i].dtype or _compute_dtype(op, values)
        kinds.setdefault((kind, "float32" if kind == "other" else dtype), []).append(i)
        wanted = any(values[name].requires_grad for name in op.inputs)
        backward[i] = training and wanted and any(values[name].requires_grad for name in op.outputs)
        made = {name for member in op.members for name in member.outputs} - set(op.outputs)
        inner += [(i, tensors.index[name]) for name in sorted(made) if values[name].root == name]
        if backward[i]:
            roots = [values[values[name].root] for name in own[i].saved]
            whole += [(i, tensors.index[root.name]) for root in roots if root.origin == "input"]
        if op.is_shared and training:
            whole += [(i, tensors.index[name]) for name in op.outputs if name in kept_shared]
    matrices = [(i, found) for i, op in enumerate(ops) if (found := matrix_operands(op, values)) is not None]
    slots = np.array([slots for _, slots in matrices], dtype=np.int64).reshape(-1, 3)
    metas = [[values[(*ops[i].inputs, *ops[i].outputs)[slot]] for slot in found] for i, found in matrices]
    works = np.array([one.works for one in own], dtype=np.float64)
    return OpFacts(
        kinds={key: np.array(found, dtype=np.int64) for key, found in sorted(kinds.items())},
        is_view=np.array([is_view(op, values) for op in ops], dtype=np.bool_),
        has_backward=backward,
        keeps=backward if training else np.array([bool(one.saved) for one in own], dtype=np.bool_),
        has_batch=np.array([any(dims[name] is not None for name in (*op.inputs, *op.outputs)) for op in ops]),
        forward_kernels=np.array([one.forward_kernels for one in own]),
        backward_kernels=np.array([one.backward_kernels for one in own]),
        flops_forward=np.array([op.flops_forward for op in ops], dtype=np.float64) * works,
        flops_backward=np.array([op.flops_backward for op in ops], dtype=np.float64) * works,
        saved_extra_bytes=np.array([one.extra_bytes for one in own], dtype=np.float64),
        inner=np.array(inner, dtype=np.int64).reshape(-1, 2),
        inner_passes=np.array([one.inner_passes for one in own], dtype=np.float64),
        matrices=np.array([i for i, _ in matrices], dtype=np.int64),
        matrix_slots=slots,
        matrix_items=np.array([[v.meta.num_bytes / max(v.meta.numel, 1) for v in row] for row in metas]).reshape(-1, 3),
        matrix_wanted=np.array([[v.requires_grad for v in row[:2]] for row in metas], np.float64).reshape(-1, 2).T,
        block=np.array([op.block for op in ops], dtype=np.int64),
        whole_saved=np.array(whole, dtype=np.int64).reshape(-1, 2),
    )


def _compute_dtype(op: Op, values: Mapping[str, Value]) -> str:
    """Dtype of the first floating operand, else of the first result."""
    metas = [values[name].meta for name in (*op.inputs, *op.outputs)]
    return next((meta.dtype for meta in metas if meta.is_floating), "float32")


@dataclass(frozen=True)
class KeptParameters:
    """`stored` with its own parts; parts [all choices] of what ops read, of the optimizer's state, and into which
    gradients are cut before the end of the step.
    """

    stored: Kept
    exposed_parts: Array
    optimizer_parts: Array
    early_parts: Array


@dataclass(frozen=True)
class ParameterSheet:
    """Choices of parameters. Arrays are [choice] or [choice, axis] as in `ParameterChoices`, [parameter] where stated.

    Attributes:
        storage, exposed, optimizer: how each choice cuts its parameter.
        exposed_ids: sharding ids of what ops read.
        gathered_from, gathered_to: sharding ids of the gather that exposes it.
        requires_grad, block_bytes: [parameter]; block_bytes are those of all parameters of its block.
        item_bytes, whole_share: [parameter]: bytes of one element; its share of its block's parameter bytes.
        tensor: [parameter], row in `Tensors`.
    """

    choices: tuple[ParameterChoices, ...]
    owners: Owners
    storage: ShardRows
    exposed: ShardRows
    optimizer: ShardRows
    exposed_ids: Codes
    gathered_from: Codes
    reduced: Mask
    scattered: Mask
    early: Mask
    regathered: Mask
    requires_grad: Mask
    block_bytes: Array
    item_bytes: Array
    whole_share: Array
    tensor: Codes

    def keep(self, sizes: Sizes, axis_sizes: Sequence[int]) -> KeptParameters:
        """Keeps what divides evenly."""
        (stored, a), (exposed, b), (optimizer, c) = (
            rows.parts(sizes, axis_sizes) for rows in (self.storage, self.exposed, self.optimizer)
        )
        early = np.prod(np.where(self.early, np.array(axis_sizes, dtype=np.float64), 1.0), axis=1)
        return KeptParameters(self.owners.keep(a & b & c, stored), exposed, optimizer, early)


def make_parameter_sheet(
    parameters: Sequence[Value], homes: Sequence[int], choices: Sequence[ParameterChoices], tensors: Tensors
) -> ParameterSheet:
    """The sheet of `parameters`, at home in the given blocks."""
    counts = [len(found.grid.choices) for found in choices]
    tensor = np.array([tensors.index[value.name] for value in parameters], dtype=np.int64)
    in_block: dict[int, int] = {}
    for value, home in zip(parameters, homes, strict=True):
        in_block[home] = in_block.get(home, 0) + value.meta.num_bytes

    exposed = np.concatenate([c.exposed for c in choices])
    block_bytes = np.array([in_block[home] for home in homes], dtype=np.float64)

    def rows(codes: Codes) -> ShardRows:
        return shard_rows(np.repeat(tensor, counts), codes, tensors.width)

    return ParameterSheet(
        tuple(choices),
        _owners(counts, [found.preferences for found in choices]),
        storage=rows(np.concatenate([c.storage for c in choices])),
        exposed=rows(exposed),
        optimizer=rows(np.concatenate([c.optimizer for c in choices])),
        exposed_ids=sharding_ids(exposed),
        gathered_from=sharding_ids(np.concatenate([c.gathered_from for c in choices])),
        reduced=np.concatenate([c.reduced for c in choices]),
        scattered=np.concatenate([c.scattered for c in choices]),
        early=np.concatenate([c.early for c in choices]),
        regathered=np.concatenate([c.regathered for c in choices]),
        requires_grad=np.array([value.requires_grad for value in parameters], dtype=np.bool_),
        block_bytes=block_bytes,
        item_bytes=np.array([BYTES_BY_DTYPE[value.meta.dtype] for value in parameters], dtype=np.float64),
        whole_share=np.array([value.meta.num_bytes for value in parameters]) / np.maximum(block_bytes, 1.0),
        tensor=tensor,
    )  # fmt: skip
