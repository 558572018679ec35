"""Choices: what each op and parameter may do on every axis, under the user's pins, before sizes are looked at.

Pins give the axes of a mesh roles by their names (`ir.mesh.axis_names`). Axes of size 1 offer only the first entry
(`replicate`, `invariant`), so the result depends on which axes are active, not on their sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from autopar.cost.layouts import Codes, Grid, Mask, make_grid, without_gradient
from autopar.ir.graph import Op, OpGraph
from autopar.ir.mesh import axis_names
from autopar.ir.placement import REPLICATE, Placement
from autopar.ir.solution import Pins
from autopar.ir.strategy import AxisStrategy, ParameterAxisStrategy
from autopar.rules.batch import settled_strategy
from autopar.rules.experts import EXCHANGE, EXCHANGING, EXPERTS
from autopar.rules.parameters import parameter_axis_strategies
from autopar.rules.sequence import SequenceParts, sequence_parts, sequence_strategy
from autopar.rules.strategies import FOLLOW, axis_strategies

BY_EXPERT = (EXPERTS, EXCHANGE)
WHOLE = ("replicate", "invariant")
"""Labels of what every rank has or does whole."""
A = TypeVar("A", AxisStrategy, ParameterAxisStrategy)


@dataclass(frozen=True)
class Preference:
    """On one axis: leave out the `avoided` choices if one of the `preferred` divides evenly. Masks over choices."""

    avoided: Mask
    preferred: Mask


def keep(even: Mask, preferences: Sequence[Preference]) -> Mask:
    """Choices that remain, given which divide evenly."""
    for preference in preferences:
        if np.any(even & preference.preferred):
            even = even & ~preference.avoided
    return even


@dataclass(frozen=True)
class OpChoices:
    """All combinations of an op's strategies: codes of every operand and result, [choice, axis] each."""

    grid: Grid
    inputs: tuple[Codes, ...]
    outputs: tuple[Codes, ...]
    splits_work: Mask
    is_exchanged: Mask
    preferences: tuple[Preference, ...]


@dataclass(frozen=True)
class ParameterChoices:
    """All combinations of a parameter's strategies; codes are [choice, axis].

    Attributes:
        gathered_from: storage with the axes that expose a whole value at no cost replaced by what they expose.
        reduced, scattered: [choice, axis], gradient is all-reduced (`replicated`) or reduce-scattered (zero1, zero2).
        early: [choice, axis], it is so after every microbatch (`zero2`).
        regathered: [choice], some axis is `zero3`.
    """

    grid: Grid
    storage: Codes
    exposed: Codes
    optimizer: Codes
    gathered_from: Codes
    reduced: Mask
    scattered: Mask
    early: Mask
    regathered: Mask
    preferences: tuple[Preference, ...]


def matches(regex: str, op: Op) -> bool:
    """Whether a constraint means this op, by its name or its module path."""
    return any(re.fullmatch(regex, name) for name in (op.name, op.module_path))


class ChoiceMaker:
    """Makes and keeps the choices of one graph under one set of pins."""

    def __init__(self, graph: OpGraph, pins: Pins, dims: Mapping[str, int | None]) -> None:
        self.graph = graph
        self.pins = pins
        self.dims = dims
        self._ops: dict[tuple[str, tuple[bool, ...]], OpChoices] = {}
        self._parameters: dict[tuple[str, tuple[bool, ...]], ParameterChoices] = {}

    def op(self, op: Op, active: tuple[bool, ...]) -> OpChoices:
        """Choices of an op; `active[axis]` says whether the axis is longer than 1."""
        key = (op.name, active)
        if key not in self._ops:
            self._ops[key] = self._make_op(op, active)
        return self._ops[key]

    def parameter(self, name: str, active: tuple[bool, ...], whole: bool) -> ParameterChoices:
        """Choices of a parameter; only `invariant` if it must stay whole."""
        key = (name, active)
        if key not in self._parameters:
            roles = axis_names(len(active))
            options = [
                self._parameter_options(name, role, on and not whole) for role, on in zip(roles, active, strict=True)
            ]
            grid = make_grid(options)
            preferences = tuple(
                self._zero_preference(grid, axis)
                for axis, role in enumerate(roles)
                if self.pins.zero in (1, 2, 3) and (role == "dp" or (role != "tp" and active[axis]))
            )
            self._parameters[key] = _parameter_choices(grid, options, preferences)
        return self._parameters[key]

    @cached_property
    def sequence(self) -> SequenceParts:
        """Where the sequence is in the graph."""
        return sequence_parts(self.graph, self.dims)

    def _is_pinned(self, role: str) -> bool:
        pins = self.pins
        degrees = {"dp": pins.dp, "tp": pins.tp, "ep": 1, "cp": 1}
        return pins.roles or degrees.get(role) is not None

    def _make_op(self, op: Op, active: tuple[bool, ...]) -> OpChoices:
        values = self.graph.values
        every = axis_strategies(op, values)
        batch = settled_strategy(op, values, self.dims, self.graph.batch_size)
        roles = axis_names(len(active))
        options = [self._op_options(op, every, batch, role, on) for role, on in zip(roles, active, strict=True)]
        if not any(values[name].requires_grad for name in op.outputs):
            options = [self._smallest_first(own) for own in options]
        grid = make_grid(options)
        preferences = (self._op_preference(op, grid, axis, role) for axis, role in enumerate(roles) if active[axis])
        return OpChoices(
            grid,
            tuple(
                _codes(grid, [[s.inputs[i] for s in axis] for axis in options], values[name].requires_grad)
                for i, name in enumerate(op.inputs)
            ),
            tuple(
                _codes(grid, [[s.outputs[i] for s in axis] for axis in options], values[name].requires_grad)
                for i, name in enumerate(op.outputs)
            ),
            np.asarray([[s.splits_work for s in choice] for choice in grid.choices], dtype=np.bool_),
            np.asarray([[s.label in EXCHANGING for s in choice] for choice in grid.choices], dtype=np.bool_),
            tuple(p for p in preferences if p is not None),
        )

    def _op_options(
        self, op: Op, every: Sequence[AxisStrategy], batch: AxisStrategy | None, role: str, on: bool
    ) -> Sequence[AxisStrategy]:
        if not on or op.is_shared:
            return every[:1]
        every = self._constrained(op, every)
        if not self._is_pinned(role):
            return every
        if role == "tp":
            others = tuple(s for s in every if s != batch)
            return others if self.pins.sequence is None else self._along_tensor(op, others)
        if role == "cp":
            along = sequence_strategy(op, self.graph.values, self.sequence.dims)
            return (*every[:1], *_carrying(along, every))
        by_expert = tuple(s for s in every if role == "ep" and s.label in BY_EXPERT)
        return (*every[:1], *_carrying(batch, every), *by_expert)

    def _along_tensor(self, op: Op, every: Sequence[AxisStrategy]) -> Sequence[AxisStrategy]:
        """What `sequence` leaves on the tensor axis: the stream along the sequence or whole, nothing else along it."""
        split = tuple(s for s in every if self.sequence.splits(op, s))
        if op.name in self.sequence.stream:
            return (*every[:1], *split) if self.pins.sequence else every[:1]
        return tuple(s for s in every if s not in split) or every[:1]

    def _constrained(self, op: Op, every: Sequence[AxisStrategy]) -> Sequence[AxisStrategy]:
        """Strategies that `without` and `ops` leave; the last constraint that matches decides."""
        pins = self.pins
        left = tuple(s for s in every if s.label not in pins.without) or every[:1] if pins.without else every
        for regex, label in pins.ops:
            if matches(regex, op) and any(s.label == label for s in every):
                left = tuple(s for s in every if s.label == label)
        return left

    def _op_preference(self, op: Op, grid: Grid, axis: int, role: str) -> Preference | None:
        """Pinned data and context axes: no `replicate` if the dim divides. Pinned tensor axis: no layer stays whole."""
        if not self._is_pinned(role):
            return None
        labels = np.asarray([choice[axis].label for choice in grid.choices])
        if role == "ep" and np.any(np.isin(labels, BY_EXPERT)):
            return Preference(~np.isin(labels, BY_EXPERT), np.isin(labels, BY_EXPERT))
        if role == "tp" and self.pins.sequence is not None and op.name in self.sequence.lookups:
            return Preference(labels != "rows", labels == "rows")
        if role == "tp" and not self._is_layer(op):
            return None
        return Preference(labels == "replicate", ~np.isin(labels, ("replicate", "partial", FOLLOW)))

    def _is_layer(self, op: Op) -> bool:
        """It multiplies with a parameter, or sequence parallelism is pinned to split it."""
        if self.pins.sequence and op.name in self.sequence.stream:
            return True
        values = self.graph.values
        return op.flops_forward > 0 and any(values[values[name].root].origin == "parameter" for name in op.inputs)

    def _parameter_options(self, name: str, role: str, on: bool) -> Sequence[ParameterAxisStrategy]:
        every = parameter_axis_strategies(self.graph.values[name])
        if not on:
            return every[:1]
        pinned, zero = self._is_pinned(role), self.pins.zero
        allowed = {s.label for s in every}
        if zero != 2:
            allowed.discard("zero2")
        if pinned and role != "tp" and not (role == "ep" and name in self._expert_parameters):
            allowed.discard("sharded")
        if zero == 0 or (pinned and role == "tp"):
            allowed -= {"zero1", "zero2", "zero3"}
        return self._smallest_first([s for s in every if s.label in allowed])

    def _smallest_first(self, options: Sequence[A]) -> Sequence[A]:
        """Of equal choices the first is taken. Where nothing is trained, a part of what is kept whole can be read at no
        cost; it is kept in parts all the same.
        """
        return sorted(options, key=lambda s: s.label in WHOLE) if self.graph.is_inference else tuple(options)

    @cached_property
    def _expert_parameters(self) -> frozenset[str]:
        values = self.graph.values
        regions = (op for op in self.graph.ops if any(s.label in BY_EXPERT for s in axis_strategies(op, values)))
        return frozenset(name for op in regions for name in op.inputs if values[name].origin == "parameter")

    def _zero_preference(self, grid: Grid, axis: int) -> Preference:
        """`zero` pinned to 1, 2 or 3: that storage wherever it divides."""
        labels = np.asarray([choice[axis].label if choice else "" for choice in grid.choices])
        wanted = labels == f"zero{self.pins.zero}"
        return Preference(~wanted & (labels != "sharded"), wanted)


def _carrying(split: AxisStrategy | None, every: Sequence[AxisStrategy]) -> tuple[AxisStrategy, ...]:
    """What carries a split of samples or positions through an op; a parameter that is only viewed on its way to those
    keeps its gradient pending, so that it is summed once a step.
    """
    return (split,) if split is not None else tuple(s for s in every if s.label == FOLLOW)


def _codes(grid: Grid, per_axis: Sequence[Sequence[Placement]], requires_grad: bool) -> Codes:
    codes = grid.codes(per_axis)
    return codes if requires_grad else without_gradient(codes)


def _parameter_choices(
    grid: Grid, options: Sequence[Sequence[ParameterAxisStrategy]], preferences: tuple[Preference, ...]
) -> ParameterChoices:
    labels = np.asarray([[s.label for s in choice] for choice in grid.choices])
    whole = [
        [REPLICATE if s.label in ("replicated", "zero1", "zero2") else s.storage for s in axis] for axis in options
    ]
    return ParameterChoices(
        grid,
        grid.codes([[s.storage for s in axis] for axis in options]),
        grid.codes([[s.exposed for s in axis] for axis in options]),
        grid.codes([[s.optimizer for s in axis] for axis in options]),
        grid.codes(whole),
        labels == "replicated",
        np.isin(labels, ("zero1", "zero2")),
        labels == "zero2",
        np.any(labels == "zero3", axis=1),
        preferences,
    )
