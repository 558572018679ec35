"""Passes: behind a switch from data to tensor parallelism, the model runs in passes over parts of each microbatch.

Ranks of an axis that split samples up to some block and features from there on gather each other's samples between the
two. In one go (scheme (a) of Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks") every
rank holds the activations of all samples, and computes nothing while they come. In passes, forward and backward of the
blocks behind the switch run for one part of the samples while those of the next part are on their way:

- `turns` (scheme (b)): a pass is about the samples of one rank, which sends them to all others and gets back the
  gradient; as many passes as ranks
- `shares` (scheme (c)): a pass is about an equal share of every rank's samples; any number of passes that divides them

With `update` "step" the gradients of all passes are added up, and are those of the whole microbatch: exact, as with
microbatches. With "pass" the blocks behind the switch are updated after each pass (the same paper's variable batch
size): they are trained with smaller batches than the blocks before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TURNS, SHARES = "turns", "shares"
ORDERS = (TURNS, SHARES)
EACH_STEP, EACH_PASS = "step", "pass"
UPDATES = (EACH_STEP, EACH_PASS)

Runs = tuple[tuple[int, int], ...]
"""Samples of a pass, as (first, number) of runs within their microbatch, in the order in which the pass has them."""


@dataclass(frozen=True, slots=True)
class Passes:
    """See the module docstring.

    Attributes:
        block: the first behind the switch; all blocks from there on lie on the last stage.
        axis: name of the mesh axis whose ranks gather each other's samples.
        count: passes over each microbatch, >= 2.
        order: one of ORDERS.
        update: one of UPDATES.
    """

    block: int
    axis: str
    count: int
    order: str
    update: str = EACH_STEP


def samples_of(passes: Passes, index: int, *, samples: int, ranks: int, outer: int) -> Runs:
    """Samples of pass `index`.

    Args:
        samples: of a microbatch.
        ranks: of the passes' axis; `outer`: of the axes that split the same samples before it does.
    """
    slice_size = samples // outer
    own = slice_size // ranks
    firsts = range(0, samples, slice_size)
    if passes.order == TURNS:
        return tuple((first + index * own, own) for first in firsts)
    share = own // passes.count
    return tuple((first + rank * own + index * share, share) for first in firsts for rank in range(ranks))


def cut_runs(runs: Sequence[tuple[int, int]], start: int, length: int) -> Runs:
    """The samples at positions `start .. start + length - 1` of a pass."""
    found, position = [], 0
    for first, size in runs:
        low, high = max(start, position), min(start + length, position + size)
        if low < high:
            found.append((first + low - position, high - low))
        position += size
    return tuple(found)
