"""Cuts that the search does not choose: stages or chunks with equally many of the repeated blocks each.

This is how Megatron-LM and other frameworks cut a model, and what an interleaved schedule needs.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.errors import InputError
from autopar.ir.graph import OpGraph
from autopar.ir.solution import Decisions, StageChoice
from autopar.rules.recompute import layers


def even_starts(graph: OpGraph, num_parts: int) -> tuple[int, ...]:
    """First block of each part; what comes before the repeated blocks joins the first part.

    Where they do not divide, the last parts hold one block less, because the model's head lies there.

    Raises:
        InputError: there are fewer repeated blocks than parts.
    """
    firsts = [block.index for block in layers(graph)]
    if len(firsts) < num_parts:
        raise InputError(f"the model's {len(firsts)} repeated blocks do not suffice for {num_parts} equal parts")
    each, more = divmod(len(firsts), num_parts)
    return (0, *(firsts[k * each + min(k, more)] for k in range(1, num_parts)))


def with_even_cuts(decisions: Decisions, graph: OpGraph, interleave: int) -> Decisions:
    """The same strategies on evenly cut chunks, `interleave` of them on each pipeline rank.

    Raises:
        InputError: the model has too few repeated blocks, or the microbatches do not divide over the ranks, which
            an interleaved schedule needs.
    """
    ranks = decisions.stages
    if interleave > 1 and decisions.num_microbatches % len(ranks):
        raise InputError(
            f"{interleave} chunks per stage need microbatches that divide over the stages; "
            f"{decisions.num_microbatches} do not over {len(ranks)}"
        )
    starts = even_starts(graph, len(ranks) * interleave)
    stops = (*starts[1:], len(graph.blocks))
    chunks = tuple(
        StageChoice(start, stop, *_rest(ranks[chunk % len(ranks)]))
        for chunk, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )
    return replace(decisions, stages=chunks, interleave=interleave)


def _rest(stage: StageChoice) -> tuple[str, float, str]:
    return stage.recompute, stage.clock_hz, stage.gpu
