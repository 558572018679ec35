"""Carried: what a pipeline stage holds of the values that cross its cuts, beside the activations of its ops.

The pipeline engine holds what a stage received, and where it does not let go of it what the stage sent, from a
microbatch's forward to its backward. A value that ops save is counted once, in the block of the first that saves it
(`cost.moves`); the stages on the other side of a cut have a copy of their own. A stage that recomputes its blocks keeps
what its blocks hand on, and what it received.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from autopar.cost.table import CostTables
from autopar.ir.cost import CostTable, Crossing
from autopar.ir.solution import Decisions, StageChoice


class Carried(NamedTuple):
    """Bytes of one microbatch on one device of a stage.

    Attributes:
        received: from the stage before.
        held: of these, what no activation of the stage counts; with full recompute less what is sent and let go, which
            counts as handed on by its block.
        sent: what the stage hands on and no activation counts.
    """

    received: float = 0.0
    held: float = 0.0
    sent: float = 0.0


def carried(tables: CostTables, table: CostTable, decisions: Decisions, choice: Sequence[int]) -> tuple[Carried, ...]:
    """Of every stage; `choice` of every node of the table."""
    keepers = _keepers(tables) if len(decisions.stages) > 1 else {}
    values = tables.graph.values
    found = []
    for stage in decisions.stages:
        received = held = sent = 0.0
        for crossing in table.crossings:
            size = float(crossing.bytes_by_choice[choice[crossing.node]])
            keeper = keepers.get(values[crossing.value].root, -1)
            is_counted = stage.recompute != "full" and stage.start <= keeper < stage.stop
            if crossing.producer_block < stage.start <= crossing.last_block:
                received += size
                held += 0.0 if is_counted else size
            elif _is_sent(crossing, stage) and stage.recompute != "full":
                sent += 0.0 if is_counted else size
            elif _is_sent(crossing, stage) and not tables.software.keeps_sent:
                held -= size
        found.append(Carried(received, held, sent))
    return tuple(found)


def _is_sent(crossing: Crossing, stage: StageChoice) -> bool:
    return stage.start <= crossing.producer_block < stage.stop <= crossing.last_block


def _keepers(tables: CostTables) -> Mapping[str, int]:
    """Block that counts a storage among what is kept for backward."""
    found: dict[str, int] = {}
    for op in tables.graph.ops:
        for name in op.saved:
            found.setdefault(tables.graph.values[name].root, op.block)
    return found
