"""Region ops: the calls inside, with this rank's token counts in place of the global ones."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autopar.ir.graph import Arg, Op
from autopar.rewrite.torch_args import fill, resolve_target
from autopar.rules.experts import COUNTER, token_counts
from autopar.rules.local import LocalCall

CREATORS = ("aten.arange.", "aten.zeros.", "aten.ones.", "aten.full.", "aten.empty.")
"""Calls that make a tensor as long as the tokens from a number alone."""


def member_call(member: Op, region_kwargs: Mapping[str, Arg]) -> LocalCall:
    """The member's call on the local tokens.

    In a region tokens are counted by dim 0. So a count stands first in a list of sizes, or is the length of an
    `arange`; numbers anywhere else mean something else, even where they are equal.
    """
    pairs = zip(_counts(region_kwargs, "token_counts"), _counts(region_kwargs, "local_token_counts"), strict=True)
    local = dict(pairs)
    creates = member.target.startswith(CREATORS)
    args = tuple(_replace(arg, local, creates=creates) for arg in member.args)
    kwargs = {key: _replace(arg, local, creates=False) for key, arg in member.kwargs.items()}
    return LocalCall(member.target, args, kwargs)


def _counts(kwargs: Mapping[str, Arg], key: str) -> tuple[int, ...]:
    found = kwargs.get(key, ())
    return tuple(c for c in found if isinstance(c, int)) if isinstance(found, tuple) else ()


def _replace(arg: Arg, local: Mapping[int, int], *, creates: bool) -> Arg:
    if isinstance(arg, tuple) and arg and isinstance(arg[0], int):
        return (local.get(arg[0], arg[0]), *arg[1:])
    if creates and isinstance(arg, int) and not isinstance(arg, bool):
        return local.get(arg, arg)
    return arg


def result_nodes(graph: fx.Graph, op: Op, node: fx.Node) -> dict[str, fx.Node]:
    """Nodes of a call's outputs: the node itself, or its items `name:i`."""
    if op.outputs == (op.name,):
        return {op.name: node}
    items = {name: int(name.rpartition(":")[2]) for name in op.outputs}
    return {name: graph.call_function(operator.getitem, (node, index)) for name, index in items.items()}


def experts_module(region: Op, num_experts: int, device: str) -> fx.GraphModule:
    """The region's calls on any number of pairs that have rows of their own, over `num_experts` experts.

    The module takes the number of pairs, then the region's operands. Against the region as captured a token has one
    choice, so what was k is 1, and tokens are counted as pairs are.
    """
    graph = fx.Graph()
    count = graph.placeholder("count")
    nodes = {name: graph.placeholder(f"operand_{i}") for i, name in enumerate(region.inputs)}
    counts = token_counts(region)
    for member in region.members:
        inputs = tuple(nodes[name] for name in member.inputs)
        args = [fill(arg, inputs, device) for arg in member.args]
        kwargs = {key: fill(arg, inputs, device) for key, arg in member.kwargs.items()}
        if member.target == COUNTER:
            args[1:] = [num_experts, 0, num_experts - 1]
        elif "divide" in member.target and args[1] in [counts[0] // c for c in counts]:
            args[1] = 1
        else:
            args = [_counted(arg, counts, count, creates=member.target.startswith(CREATORS)) for arg in args]
        node = graph.call_function(resolve_target(member.target, device), tuple(args), kwargs)
        nodes |= result_nodes(graph, member, node)
    graph.output(nodes[region.outputs[0]])
    return fx.GraphModule(torch.nn.Module(), graph, class_name="Experts")


def _counted(arg: Any, counts: tuple[int, ...], count: fx.Node, *, creates: bool) -> Any:
    """`member_call`'s rule, with one count for pairs and tokens that is known when the call is made."""
    if isinstance(arg, list) and arg and isinstance(arg[0], int) and arg[0] in counts:
        return [count, *arg[1:]]
    return count if creates and type(arg) is int and arg in counts else arg
