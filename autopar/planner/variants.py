"""Variants of a plan that the search does not enumerate: other recompute policies, interleaved pipelines and passes.

The search decides between no and full recompute on every stage, and knows pipelines of one chunk per rank. Each of its
plans is therefore tried again with the policies in between, and with more chunks per rank; simulation decides. So are
the exact schemes of passes (`ir.passes`). The strategies of ops and parameters stay. Backward is split (zero-bubble)
only where that is pinned: what such a pipeline holds of its sends is overrated (by up to 42 % of the memory measured on
four CPU processes with small activations).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autopar.cost.table import CostTables
from autopar.ir.graph import OpGraph
from autopar.ir.offload import Offload
from autopar.ir.solution import KEPT, Decisions, Pins
from autopar.planner.cuts import with_even_cuts
from autopar.planner.passes import TOKEN_LOSS, schemes
from autopar.rules.recompute import layers

MOST_CHUNKS = 6
"""Per rank: bubbles shrink with the chunks, and what is left to gain shrinks faster."""


class Variants:
    """Makes variants of plans of one graph; tables of other policies are made once, when first asked for."""

    def __init__(self, graph: OpGraph, tables: CostTables, pins: Pins) -> None:
        self.graph, self.pins = graph, pins
        self._tables = {tables.keep: tables}
        self._num_layers = len(layers(graph))

    def of(self, decisions: Decisions) -> Iterator[tuple[CostTables, Decisions]]:
        """Variants with the tables that price them; the plan itself is not among them."""
        first = next(iter(self._tables.values()))
        policies = [(first, decisions)]
        if self.pins.recompute is None and any(stage.recompute == "full" for stage in decisions.stages):
            for policy in KEPT[1:]:
                stages = tuple(replace(stage, recompute=policy) for stage in decisions.stages)
                policies.append((self._keeping(policy), replace(decisions, stages=stages)))
        for tables, found in policies:
            if found is not decisions:
                yield tables, found
            yield from ((tables, scheme) for scheme in self._schemes(found))
            yield from ((tables, with_even_cuts(found, self.graph, chunks)) for chunks in self._chunks(found))

    def _schemes(self, decisions: Decisions) -> Iterator[Decisions]:
        """Passes behind a switch from data to tensor parallelism, where nothing that is pinned speaks against them.

        Not for losses over tokens, of which parts of a batch may ignore more or less than others.
        """
        loss = self.graph.producers()[self.graph.loss]
        is_free = not self.pins.ops and self.pins.offload == Offload()
        if decisions.mesh.num_devices > 1 and is_free and loss.target != TOKEN_LOSS:
            yield from schemes(self.graph, decisions)

    def _keeping(self, policy: str) -> CostTables:
        if policy not in self._tables:
            first = next(iter(self._tables.values()))
            self._tables[policy] = first.keeping(policy)
        return self._tables[policy]

    def _chunks(self, decisions: Decisions) -> list[int]:
        """Numbers of chunks per rank that cut the layers evenly and that the schedule can run."""
        ranks, pins = len(decisions.stages), self.pins
        is_free = pins.interleave is None and not pins.even_cuts and pins.schedule in (None, "1f1b")
        alike = len({(stage.recompute, stage.clock_hz, stage.gpu) for stage in decisions.stages}) == 1
        if ranks == 1 or not is_free or not alike or decisions.num_microbatches % ranks:
            return []
        return [v for v in range(2, MOST_CHUNKS + 1) if self._num_layers % (ranks * v) == 0]
