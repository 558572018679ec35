"""The entry: preprocess, bound, search, prove; every answer carries a bound.

Objectives and excesses are evaluated in exact integers on the unreduced instance.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from autopar.search.costnet.dual import Chains
from autopar.search.costnet.instance import Instance
from autopar.search.costnet.model import Model, make_model
from autopar.search.costnet.primal import Answer, decode
from autopar.search.costnet.rows import Integers
from autopar.search.costnet.shrink import InfeasibleModelError, shrink


@dataclass(frozen=True)
class Sizes:
    """Nodes, strategies, legal pairs and liveness rows."""

    nodes: int
    strategies: int
    pairs: int
    rows: int


@dataclass(frozen=True)
class Outcome:
    """What `solve` found.

    Attributes:
        status: optimal, feasible, infeasible (proven), no-solution.
        choice: one strategy per node of the instance, or None.
        objective: its exact cost; None without a feasible choice.
        bound: no feasible choice costs less.
        excess: smallest excess over the usage limit among the legal choices seen (0 with a feasible one).
        before, after: sizes of the instance and of what preprocessing left.
        wall_s, cpu_s: time spent.
    """

    status: str
    choice: Integers | None
    objective: int | None
    bound: float
    excess: int | None
    before: Sizes
    after: Sizes
    wall_s: float
    cpu_s: float

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|; inf without a choice."""
        if self.objective is None:
            return math.inf
        return (self.objective - self.bound) / max(abs(self.objective), 1)


@dataclass
class _Search:
    instance: Instance
    model: Model
    deadline: float
    best: tuple[int, Integers] | None = None
    bound: float = -math.inf
    excess: int | None = None

    def offer(self, chains: Chains, answer: Answer) -> None:
        """Expand and evaluate exactly; keep the best feasible choice."""
        if not math.isfinite(answer.cost) or (self.best is not None and answer.cost >= self.best[0]):
            return
        choice = self.model.expand(chains.nodes, answer.choice.tolist(), self.instance.num_nodes)
        cost, excess = self.instance.evaluate(choice)
        if cost is None:
            return
        self.excess = excess if self.excess is None else min(excess, self.excess)
        if excess == 0 and (self.best is None or cost < self.best[0]):
            self.best = (cost, choice)

    @property
    def is_proven(self) -> bool:
        return self.best is not None and math.ceil(self.bound - 1e-6 * max(1.0, abs(self.bound) * 1e-6)) >= self.best[0]


def solve(instance: Instance, *, time_limit_s: float = 60.0) -> Outcome:
    """Minimise; stops when proven or at the limit (which makes the answer depend on the machine)."""
    wall, cpu = time.perf_counter(), time.process_time()
    model = make_model(instance)
    before = Sizes(instance.num_nodes, instance.num_strategies, instance.num_pairs, len(model.limits))
    search = _Search(instance, model, wall + time_limit_s)
    try:
        shrink(model)
    except InfeasibleModelError:
        return Outcome(
            "infeasible",
            None,
            None,
            math.inf,
            None,
            before,
            before,
            time.perf_counter() - wall,
            time.process_time() - cpu,
        )
    after = Sizes(*model.size())
    _run(search)
    status = "optimal" if search.is_proven else "feasible" if search.best else "no-solution"
    objective, choice = search.best if search.best is not None else (None, None)
    bound = min(search.bound, objective) if objective is not None else search.bound
    return Outcome(
        status,
        choice,
        objective,
        float(objective) if status == "optimal" and objective is not None else bound,
        search.excess,
        before,
        after,
        time.perf_counter() - wall,
        time.process_time() - cpu,
    )


def _run(search: _Search) -> None:
    chains = Chains(search.model)
    round_ = 0
    while time.perf_counter() < search.deadline and not search.is_proven:
        search.bound = max(search.bound, chains.sweep())
        round_ += 1
        if round_ % 10 == 0:
            for upward in (True, False):
                search.offer(chains, decode(chains, upward))
