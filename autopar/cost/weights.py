"""The second half of backward under schedules that split it: seconds of the gradients of weights, and what waits.

Backward of a product is two products of as many operations as forward has: the gradients of its operand and of its
weight. Each is taken as half of what the op's own backward takes, what is computed again before it apart. Until its
weight's turn a product keeps its operand and the gradient of its result; an operand that several products read is
kept once. Other ops have no second half (`rules.weights`).
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.cost.memory import slack_share
from autopar.cost.table import CostTables
from autopar.ir.cost import CostNode, CostTable
from autopar.ir.graph import Op, Value
from autopar.ir.partition import partition
from autopar.ir.pipeline import splits_backward
from autopar.ir.placement import Sharding, local_shape
from autopar.ir.solution import Decisions
from autopar.ir.strategy import input_sharding, output_sharding
from autopar.rules.weights import delayed_products, weight_slots

HALF = 0.5
"""Of a product's backward: the gradient of its weight."""


class WeightHalves:
    """Of the products of one plan; none where its schedule does not split backward."""

    def __init__(self, tables: CostTables, table: CostTable, decisions: Decisions) -> None:
        self._tables, self._table = tables, table
        self._delayed: tuple[frozenset[str], ...] = ()
        self._ops: Mapping[str, Op] = {}
        self._values: Mapping[str, Value] = {}
        if not tables.training or not splits_backward(decisions.schedule, decisions.num_ranks):
            return
        graph = tables.graph
        parts = partition(graph, decisions.stages)
        self._delayed = tuple(delayed_products(part.ops, graph.values, decisions.parameters) for part in parts)
        self._ops = {op.name: op for op in graph.ops}
        self._values = tables.microbatch_values(table.num_microbatches)
        spec = tables.cluster.spec
        self._slack = 1.0 + slack_share(tables.software, spec.unseen_share)

    def of(self, node: CostNode, p: int, stage: int, block: int) -> tuple[float, dict[str, float]]:
        """Seconds of one microbatch that the node's strategy `p` leaves for later, and bytes kept until then, by cause.

        Args:
            stage, block: where the node occurs.
        """
        if not self._delayed or node.kind != "op":
            return 0.0, {}
        op = self._ops.get(node.names[node.blocks.index(block)])
        if op is None or op.name not in self._delayed[stage]:
            return 0.0, {}
        again = self._tables.again.get(op.name)
        own_s = float(node.backward_s[p]) - (0.0 if again is None else again.reruns * float(node.forward_s[p]))
        slots = weight_slots(op, self._tables.graph.values)
        assert slots is not None
        strategy, x, made = node.choices[p], op.inputs[slots[0]], op.outputs[0]
        kept = {
            self._values[x].root: self._bytes(x, input_sharding(strategy, slots[0])),
            f"gradient of {made}": self._bytes(made, output_sharding(strategy, 0)),
        }
        return HALF * max(0.0, own_s), kept

    def _bytes(self, name: str, sharding: Sharding) -> float:
        meta = self._values[name].meta
        shape = local_shape(meta.shape, sharding, self._table.mesh.sizes)
        return self._slack * float((meta if shape is None else meta.with_shape(shape)).num_bytes)
