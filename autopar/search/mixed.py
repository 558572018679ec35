"""Mixed: refinement of skeletons whose stages lie on several types of device.

Levels are those of `refine`. Bounds that hold for every cut come from the network of `kinds`, under the aggregated
memory row; layouts are bounded and closed like any other, every stage in the channels of its type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autopar.search.bounds import tighten
from autopar.search.evaluate import Figures, Layout, evaluate_mixed
from autopar.search.kinds import price_kinds, time_weights
from autopar.search.optimist import Blocks
from autopar.search.problem import Problem, Weights
from autopar.search.refine import Asker, Refiner
from autopar.search.relax import Relaxation, cheapest_sends, memory_relaxation, surely_in_flight
from autopar.search.shared import Space
from autopar.search.space import Skeleton


@dataclass(frozen=True)
class MixedRefiner(Refiner):
    """`problem` is that of all types."""

    def figures(self, layout: Layout, choice: tuple[int, ...]) -> Figures:
        problem, kinds = self.problem, layout.kinds
        tables = [(problem.part(kinds, k).table, problem.link(kinds, k)) for k in range(layout.num_stages)]
        return evaluate_mixed(tables, self.space.fixed_w(self.skeleton.num_gpus, kinds), layout, choice)

    def blocks(self) -> tuple[Blocks, ...]:
        return tuple(self.space.blocks(part) for part in self.problem.parts)

    def spread(self, relax: Relaxation) -> tuple[float, tuple[int, ...] | None]:
        problem, weights = self._priced(relax, spread=True)
        run = problem.solve(weights)
        return run.value + weights.constant, run.choice

    def table(self, relax: Relaxation) -> float:
        """Under the memory row too."""
        bound, choice = self.spread(relax)
        if choice is None or bound >= self.offer(relax, choice):
            return bound
        problem, weights = self._priced(relax, spread=True)
        work = memory_relaxation(replace(relax, problem=problem), weights, surely_in_flight(relax))
        tighten(work, lambda choice: self.offer(relax, choice), self.space.tolerance / 4)
        return max(bound, work.bound)

    def memory(self, relax: Relaxation) -> float:
        """Nothing new: the table level had the memory row."""
        return -math.inf

    def _additive(self, relax: Relaxation) -> float:
        problem, weights = self._priced(relax, spread=False)
        return problem.solve(weights).value + weights.constant

    def _priced(self, relax: Relaxation, *, spread: bool) -> tuple[Problem, Weights]:
        """The network of `kinds` with its cheapest sends; weights of time A without `spread`."""
        space, skeleton = self.space, self.skeleton
        redo = skeleton.mode == "full"
        key = (replace(skeleton, mode="full" if redo else "none"), relax.prices, spread)
        if key not in space.priced:
            weights = dict.fromkeys(sorted(set(skeleton.kinds)), relax.prices.step_weight)
            if spread and space.mixed is not None:
                weights = time_weights(skeleton, space.mixed.speeds, relax.prices.step_weight)
            problem, priced = price_kinds(relax.problem, skeleton.kinds, weights, relax.prices.beta, redo=redo)
            base = space.base(skeleton.sizes, skeleton.num_microbatches)
            sends = 0.0 if base is None else cheapest_sends(replace(relax, problem=base), min(weights.values()))
            space.priced[key] = problem, replace(priced, constant=sends)
        return space.priced[key]


def make_refiner(space: Space, skeleton: Skeleton, problem: Problem, asker: Asker) -> Refiner:
    """The refiner that fits the cluster."""
    return (MixedRefiner if skeleton.kinds else Refiner)(space, skeleton, problem, asker)
