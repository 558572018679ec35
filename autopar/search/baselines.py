"""Baselines: well-known ways to split a model, as restrictions of the same space, searched like a plan.

- data parallel: every device holds the whole model and takes part of the batch;
- fsdp: the same with parameters, gradients and optimizer state split over the devices (ZeRO-3);
- tensor x pipeline x data: a grid in which one axis splits the batch alone, one everything but the batch, beside
  pipeline stages (Narayanan et al. 2021).

Microbatches, recompute, clocks and the number of devices are free in all of them, so each is the best of its family.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autopar.errors import InputError
from autopar.ir.cost import TableSource
from autopar.ir.solution import Limits, Objective, Pins, Solution
from autopar.search.infeasible import least_peak
from autopar.search.solve import SEARCH_SHARE, make_space, solution_of, useful_clocks
from autopar.search.space import list_skeletons
from autopar.search.stages import Question

BASELINES: Mapping[str, Pins] = MappingProxyType(
    {
        "data parallel": Pins(roles=True, tp=1, pp=1, zero=0),
        "fsdp": Pins(roles=True, tp=1, pp=1, zero=3),
        "tensor x pipeline x data": Pins(roles=True),
    }
)


@dataclass(frozen=True)
class Family:
    """The best plan of a family; None with the least memory that any of its plans needs (inf: there is none)."""

    solution: Solution | None
    least_peak_bytes: float


def best_of_family(
    tables: TableSource,
    objective: Objective,
    *,
    pins: Pins,
    limits: Limits,
    use_all: bool = False,
    gap_tolerance: float = 1e-2,
    time_limit_s: float | None = None,
) -> Family:
    """Search a family; `tables` must be made with the same `pins`."""
    started = time.monotonic()
    try:
        skeletons = list_skeletons(
            tables, pins, use_all=use_all, max_microbatches=None, clocks=useful_clocks(tables, objective, limits)
        )
    except InputError:
        return Family(None, math.inf)
    space = make_space(tables, skeletons, pins, limits, gap_tolerance * SEARCH_SHARE)
    space.deadline_s = None if time_limit_s is None else started + time_limit_s
    question = Question(space, objective, limits)
    if question.run().plan is not None:
        return Family(solution_of(question, gap_tolerance, time.monotonic() - started), 0.0)
    return Family(None, least_peak(space) if limits.is_free else math.inf)
