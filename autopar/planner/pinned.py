"""Restrictions in the user's words: their check against the graph, which the search cannot do by itself."""

from __future__ import annotations

import re

from autopar.cost.choices import matches
from autopar.cost.memory import optimizer_bytes, optimizer_states
from autopar.errors import InputError
from autopar.ir.graph import OpGraph
from autopar.ir.offload import PLACES
from autopar.ir.solution import Pins
from autopar.planner.request import PlanRequest
from autopar.rules.strategies import axis_strategies


def check_constraints(graph: OpGraph, pins: Pins) -> None:
    """Every per-op constraint is a regex that matches some op which has the label.

    Raises:
        InputError: names the constraint, and the labels that the ops it matches have.
    """
    for regex, label in pins.ops:
        try:
            re.compile(regex)
        except re.error as error:
            raise InputError(f"the constraint {regex!r} is no regular expression: {error}") from error
        found = [op for op in graph.ops if matches(regex, op) and not op.is_shared]
        if not found:
            paths = sorted({op.module_path for op in graph.ops if op.module_path})[:3]
            raise InputError(
                f"the constraint {regex!r} matches no op whole, neither by name nor by module path, "
                f"e.g. {', '.join([found_name(graph), *paths])}"
            )
        known = sorted({s.label for op in found for s in axis_strategies(op, graph.values)})
        if label not in known:
            raise InputError(f"no op that {regex!r} matches has the label {label!r}; theirs are {', '.join(known)}")


def check_inference(request: PlanRequest) -> None:
    """Raises InputError for what a plan that runs forward alone cannot have."""
    pins = request.pins
    given: dict[str, object] = {"schedule": pins.schedule, "vpp": pins.interleave, "zero": pins.zero or None}
    given |= {"recompute": None if pins.recompute == "none" else pins.recompute, "meshes": pins.meshes or None}
    given |= {"offload_optimizer": pins.offload_optimizer, "offload_activations": pins.offload_activations}
    wrong = [f"{name}={value}" for name, value in given.items() if value is not None]
    if wrong:
        raise InputError(f"--pin {','.join(wrong)}: for training alone; inference runs forward and keeps nothing")
    if request.cluster is not None and len(request.cluster.groups) > 1:
        raise InputError("inference plans are for clusters of one type of GPU")


def check_offload(graph: OpGraph, request: PlanRequest) -> None:
    """Raises InputError for what cannot be offloaded, alone or beside other choices."""
    pins, software = request.pins, request.software
    for name in ("offload_optimizer", "offload_activations"):
        if getattr(pins, name) not in (None, *PLACES):
            raise InputError(f"{name}={getattr(pins, name)}: expected one of {', '.join(PLACES)}")
    if pins.offload_activations and pins.recompute not in (None, "none"):
        raise InputError(
            f"--pin offload_activations={pins.offload_activations},recompute={pins.recompute}: either of the two saves "
            "a block's activations; give one of them"
        )
    if pins.offload_activations and software.fusion == "compiled":
        raise InputError(
            f"--pin offload_activations={pins.offload_activations},compile=on: what a compiled stage saves cannot be "
            "taken from it; leave one of them out"
        )
    if pins.offload_optimizer and not optimizer_bytes(graph, optimizer_states(graph.optimizer), software):
        raise InputError(
            f"--pin offload_optimizer={pins.offload_optimizer}: the optimizer {graph.optimizer} keeps no state here, "
            "so that nothing could be offloaded"
        )


def found_name(graph: OpGraph) -> str:
    """Name of some op, for an example."""
    return graph.ops[0].name if graph.ops else "none"
