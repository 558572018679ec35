"""Hash of a graph: equal for two captures of the same program, different where a plan would not carry over."""

from __future__ import annotations

from autopar.capture.classes import digest, encode_call, encode_value
from autopar.ir.graph import OpGraph


def graph_hash(graph: OpGraph) -> str:
    """SHA-256 hex of ops, names, shapes, constants and wiring. Source lines and module paths do not count."""
    values = [[name, v.origin, *encode_value(v), v.fqn, v.batch_dim] for name, v in sorted(graph.values.items())]
    ops = [
        [op.name, encode_call(op), list(op.inputs), list(op.outputs), list(op.mutates), op.block] for op in graph.ops
    ]
    blocks = [[block.start, block.stop, block.class_id] for block in graph.blocks]
    outputs = [[o.value, o.key, o.stays, o.batch_dim] for o in graph.outputs]
    rest = [outputs] if outputs else []
    return digest([values, ops, blocks, graph.loss, graph.batch_size, graph.optimizer, *rest])
