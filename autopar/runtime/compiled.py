"""Compiled stages: what lies between collectives, random draws and gathers goes through `torch.compile`.

A segment stays a graph of explicit nodes. Each run of neighbouring ATen calls becomes one module of its own, which is
compiled as a whole, for static shapes and with its backward; runs of equal code share one. Everything else runs as
before: collectives, random draws, local operations, and the calls that selective recompute watches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.errors import InputError
from autopar.program.stage import Segment, StageProgram
from autopar.torch_adapter import is_op_overload, is_random, written_arguments

LEAST_CALLS = 2
"""A single call gains nothing."""
PLAIN = (operator.getitem, torch.mul)
"""Targets of segments, besides ATen's, that compile."""


def compiled_program(program: StageProgram, backend: str) -> StageProgram:
    """The program with its segments compiled by `backend`: `inductor`, `aot_eager`, ...

    Raises:
        InputError: for an unknown backend.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=None):
        known = ", ".join(sorted(torch.compiler.list_backends(exclude_tags=None)))
        raise InputError(f"unknown backend of torch.compile {backend!r}; known: {known}")
    made: dict[str, Callable[..., Any]] = {}
    shared = None if program.shared is None else _compiled(program.shared, backend, made)
    behind = program.behind
    if behind is not None:
        behind = replace(behind, program=compiled_program(behind.program, backend))
    segments = tuple(_compiled(s, backend, made) for s in program.segments)
    return replace(program, shared=shared, segments=segments, behind=behind)


def _compiled(segment: Segment, backend: str, made: dict[str, Callable[..., Any]]) -> Segment:
    """The segment with its runs compiled; `made` holds what is compiled already, by code, and grows."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(segment.module.graph, {}))
    objects = {str(n.target): getattr(segment.module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    for index, nodes in enumerate(list(_runs(graph))):
        piece, inputs, outputs = _cut_out(nodes)
        if piece.code not in made:
            made[piece.code] = torch.compile(piece, backend=backend, dynamic=False)
        name = f"compiled_{index}"
        objects[name] = made[piece.code]
        with graph.inserting_before(nodes[0]):
            call = graph.call_module(name, tuple(inputs))
            for position, node in enumerate(outputs):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (call, position)))
        for node in reversed(nodes):
            graph.erase_node(node)
    module = fx.GraphModule(objects, graph, class_name=type(segment.module).__name__)
    return replace(segment, module=module)


def _runs(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Longest runs of neighbouring nodes that can be compiled, in order."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        if _compiles(node):
            found.append(node)
        elif node.op != "get_attr":
            yield from [found] if len(found) >= LEAST_CALLS else []
            found = []


def _compiles(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if not is_op_overload(node.target):
        return node.target in PLAIN
    return not is_random(node.target) and not written_arguments(node.target)


def _cut_out(nodes: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """The nodes as a module, what it takes, and which of them it returns."""
    inside = set(nodes)
    inputs = [*dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)]
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"given_{i}") for i, node in enumerate(inputs)}
    for i, node in enumerate(nodes):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].name = f"made_{i}"
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(torch.nn.Module(), graph, class_name="Piece"), inputs, outputs
