"""Choices: what each op and parameter may do on every axis, under the user's pins, before sizes are looked at.

Axes of size 1 offer only the first entry (`replicate`, `invariant`), so the result depends on which axes are active,
not on their sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cost.layouts import Codes, Grid, Mask, make_grid, without_gradient
from autopar.ir.graph import Op, OpGraph
from autopar.ir.placement import REPLICATE, Placement
from autopar.ir.solution import Pins
from autopar.ir.strategy import AxisStrategy, ParameterAxisStrategy
from autopar.rules.batch import batch_strategy
from autopar.rules.experts import EXCHANGING
from autopar.rules.parameters import parameter_axis_strategies
from autopar.rules.strategies import axis_strategies

DP, TP = 0, 1


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
        reduced, scattered: [choice, axis], gradient is all-reduced (`replicated`) or reduce-scattered (`zero1`).
        regathered: [choice], some axis is `zero3`.
    """

    grid: Grid
    storage: Codes
    exposed: Codes
    optimizer: Codes
    gathered_from: Codes
    reduced: Mask
    scattered: Mask
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
            options = [self._parameter_options(name, axis, on and not whole) for axis, on in enumerate(active)]
            grid = make_grid(options)
            self._parameters[key] = _parameter_choices(grid, options, self._zero_preference(grid))
        return self._parameters[key]

    def _is_pinned(self, axis: int) -> bool:
        pins = self.pins
        return pins.roles or (axis == DP and pins.dp is not None) or (axis == TP and pins.tp is not None)

    def _make_op(self, op: Op, active: tuple[bool, ...]) -> OpChoices:
        values = self.graph.values
        every = axis_strategies(op, values)
        batch = batch_strategy(op, values, self.dims, self.graph.batch_size)
        options = [self._op_options(op, every, batch, axis, on) for axis, on in enumerate(active)]
        grid = make_grid(options)
        preferences = (self._op_preference(op, grid, axis) for axis, on in enumerate(active) if on)
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
        self, op: Op, every: Sequence[AxisStrategy], batch: AxisStrategy | None, axis: int, on: bool
    ) -> Sequence[AxisStrategy]:
        if not on or op.is_shared:
            return every[:1]
        every = self._constrained(op, every)
        if not self._is_pinned(axis):
            return every
        if axis == DP:
            return every[:1] if batch is None else (every[0], batch)
        return tuple(s for s in every if s != batch)

    def _constrained(self, op: Op, every: Sequence[AxisStrategy]) -> Sequence[AxisStrategy]:
        """Strategies that `without` and `ops` leave; the last constraint that matches decides."""
        pins = self.pins
        left = tuple(s for s in every if s.label not in pins.without) or every[:1] if pins.without else every
        for regex, label in pins.ops:
            if matches(regex, op) and any(s.label == label for s in every):
                left = tuple(s for s in every if s.label == label)
        return left

    def _op_preference(self, op: Op, grid: Grid, axis: int) -> Preference | None:
        """Pinned data axis: no `replicate` if the batch divides. Pinned tensor axis: no layer stays whole."""
        values = self.graph.values
        reads_parameter = any(values[values[name].root].origin == "parameter" for name in op.inputs)
        binds = axis == DP or (op.flops_forward > 0 and reads_parameter)
        if not binds or not self._is_pinned(axis):
            return None
        labels = np.asarray([choice[axis].label for choice in grid.choices])
        return Preference(labels == "replicate", (labels != "replicate") & (labels != "partial"))

    def _parameter_options(self, name: str, axis: int, on: bool) -> Sequence[ParameterAxisStrategy]:
        every = parameter_axis_strategies(self.graph.values[name])
        if not on:
            return every[:1]
        pinned, zero = self._is_pinned(axis), self.pins.zero
        allowed = {s.label for s in every}
        if pinned and axis == DP:
            allowed.discard("sharded")
        if zero == 0 or (pinned and axis == TP):
            allowed -= {"zero1", "zero3"}
        return tuple(s for s in every if s.label in allowed)

    def _zero_preference(self, grid: Grid) -> tuple[Preference, ...]:
        """`zero` pinned to 1 or 3: that storage on the data axis wherever it divides."""
        if self.pins.zero not in (1, 3):
            return ()
        labels = np.asarray([choice[DP].label if choice else "" for choice in grid.choices])
        wanted = labels == f"zero{self.pins.zero}"
        return (Preference(~wanted & (labels != "sharded"), wanted),)


def _codes(grid: Grid, per_axis: Sequence[Sequence[Placement]], requires_grad: bool) -> Codes:
    codes = grid.codes(per_axis)
    return codes if requires_grad else without_gradient(codes)


def _parameter_choices(
    grid: Grid, options: Sequence[Sequence[ParameterAxisStrategy]], preferences: tuple[Preference, ...]
) -> ParameterChoices:
    labels = np.asarray([[s.label for s in choice] for choice in grid.choices])
    whole = [[REPLICATE if s.label in ("replicated", "zero1") else s.storage for s in axis] for axis in options]
    return ParameterChoices(
        grid,
        grid.codes([[s.storage for s in axis] for axis in options]),
        grid.codes([[s.exposed for s in axis] for axis in options]),
        grid.codes([[s.optimizer for s in axis] for axis in options]),
        grid.codes(whole),
        labels == "replicated",
        labels == "zero1",
        np.any(labels == "zero3", axis=1),
        preferences,
    )
