"""The entry: preprocess, bound, search, prove; every answer carries a bound.

Objectives and excesses are evaluated in exact integers on the unreduced instance.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from autopar.search.costnet.ascent import climb
from autopar.search.costnet.dual import Chains
from autopar.search.costnet.instance import Instance
from autopar.search.costnet.model import Model, make_model
from autopar.search.costnet.primal import Answer, decode, evaluate
from autopar.search.costnet.rows import Integers
from autopar.search.costnet.shrink import InfeasibleModelError, shrink
from autopar.search.costnet.tree import Tree
from autopar.search.costnet.windows import Windows

PREPROCESSING_SHARE = 0.4
"""Of the time limit, after which no further pass of preprocessing starts."""
PLAIN_SWEEPS, PLAIN_ROUNDS = 10, 12
CLIMB_SWEEPS, ROOT_THETA = 50, 0.1
STALL = 2e-3
"""Relative gain of the bound below which a stage ends."""
MOST_STARTS = 12
STALL_STEPS, STALL_STEPS_PER_NODE = 300, 1
WINDOW_SIZES = (6, 40)
LEAST_DOOMED = 0.05
"""Share of strategies that bounds must rule out to preprocess again."""
LARGEST_TREE, MOST_TREE_NODES = 4_000_000, 1_500
"""Table entries and nodes above which branch and bound is not tried."""
VISIT_EVERY = 60


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
    is_exhausted: bool = False

    @property
    def incumbent(self) -> float:
        return math.inf if self.best is None else float(self.best[0])

    @property
    def is_late(self) -> bool:
        return time.perf_counter() > self.deadline

    def left_s(self) -> float:
        return max(self.deadline - time.perf_counter(), 0.0)

    def offer(self, chains: Chains, answer: Answer) -> None:
        """Expand and evaluate exactly; keep the best feasible choice."""
        if not math.isfinite(answer.cost) or answer.cost >= self.incumbent:
            return
        choice = self.model.expand(chains.nodes, answer.choice.tolist(), self.instance.num_nodes)
        cost, excess = self.instance.evaluate(choice)
        if cost is None:
            return
        self.excess = excess if self.excess is None else min(excess, self.excess)
        if excess == 0 and cost < self.incumbent:
            self.best = (cost, choice)

    def raise_bound(self, bound: float, tolerance: float) -> None:
        self.bound = max(self.bound, bound - tolerance)

    @property
    def is_proven(self) -> bool:
        return self.is_exhausted or (self.best is not None and math.ceil(self.bound) >= self.best[0])


def solve(instance: Instance, *, time_limit_s: float = 60.0) -> Outcome:
    """Minimise; stops when proven or at the limit (which makes the answer depend on the machine)."""
    wall, cpu = time.perf_counter(), time.process_time()
    model = make_model(instance)
    before = Sizes(instance.num_nodes, instance.num_strategies, instance.num_pairs, len(model.limits))
    search = _Search(instance, model, wall + time_limit_s)
    try:
        shrink(model, wall + PREPROCESSING_SHARE * time_limit_s)
    except InfeasibleModelError:
        spent = time.perf_counter() - wall, time.process_time() - cpu
        return Outcome("infeasible", None, None, math.inf, None, before, before, *spent)
    after = Sizes(*model.size())
    _run(search)
    objective, choice = search.best if search.best is not None else (None, None)
    status, bound = "no-solution", search.bound
    if search.is_proven:
        status, bound = ("infeasible", math.inf) if objective is None else ("optimal", float(objective))
    elif objective is not None:
        status, bound = "feasible", min(bound, float(objective))
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return Outcome(status, choice, objective, bound, search.excess, before, after, *spent)


def _run(search: _Search) -> None:
    """Bound, then solutions, then reductions by both, then branch and bound or more solutions."""
    chains = Chains(search.model)
    if not len(chains.sizes):
        search.offer(chains, Answer(np.zeros(0, dtype=np.int64), chains.constant, 0.0))
        search.is_exhausted = True
        return
    _bound(search, chains)
    improver = Improver(search, chains)
    improver.run(search.deadline - 0.7 * search.left_s())
    if search.is_proven:
        return
    tightened = _tighten(search, chains)
    if tightened is None:
        search.is_exhausted = True
        return
    if tightened is not chains:
        chains = tightened
        improver = Improver(search, chains)
        _bound(search, chains)
    if search.is_proven or search.is_late:
        return
    if chains.num_entries <= LARGEST_TREE and len(chains.sizes) <= MOST_TREE_NODES:
        _branch(search, chains)
    else:
        improver.run(search.deadline)


def _bound(search: _Search, chains: Chains) -> None:
    """Plain sweeps, which often suffice, then multipliers; decodes now and then."""
    for _ in range(PLAIN_ROUNDS):
        before = chains.bound
        for _ in range(PLAIN_SWEEPS):
            chains.sweep()
            if search.is_late:
                break
        search.raise_bound(chains.bound, chains.tolerance)
        for upward in (True,) if search.is_late else (True, False):
            search.offer(chains, decode(chains, upward))
        if search.is_proven or search.is_late or chains.bound - before < STALL * abs(chains.bound):
            break
    stop = search.deadline - 0.5 * search.left_s()
    while not search.is_proven and time.perf_counter() < stop:
        before = chains.bound
        target = search.incumbent if search.best is not None else chains.bound + 0.3 * abs(chains.bound) + 1.0
        target = min(target, chains.bound + 0.3 * abs(chains.bound) + 1.0)
        climb(chains, target, theta=ROOT_THETA, most_sweeps=CLIMB_SWEEPS, deadline=stop)
        search.raise_bound(chains.bound, chains.tolerance)
        for upward in (True, False):
            search.offer(chains, decode(chains, upward))
        if chains.bound - before < STALL * abs(chains.bound):
            break


class Improver:
    """Windows from several starts; each start ends when it stalls."""

    def __init__(self, search: _Search, chains: Chains) -> None:
        self.search, self.chains = search, chains
        self.seed = 0

    def run(self, deadline: float, *, starts: int = MOST_STARTS) -> None:
        """Until `deadline` (perf_counter), proof, or `starts` starts."""
        for _ in range(starts):
            if self.search.is_proven or time.perf_counter() > deadline:
                return
            self._start(deadline)

    def _known(self) -> list[Answer]:
        """The incumbent, for every other start of large models; small ones profit more from different starts."""
        if self.search.best is None or len(self.chains.sizes) <= MOST_TREE_NODES or self.seed % 2:
            return []
        choice = self.search.model.local(self.chains.nodes, self.search.best[1])
        return [] if choice is None else [evaluate(self.chains, choice)]

    def _start(self, deadline: float) -> None:
        answer = min([*self._known(), *(decode(self.chains, upward) for upward in (True, False))], key=lambda a: a.rank)
        windows = Windows(self.chains, answer, self.seed)
        self.seed += 1
        patience = STALL_STEPS + STALL_STEPS_PER_NODE * len(self.chains.sizes)
        last, cost = 0, windows.cost
        while windows.steps - last < patience and time.perf_counter() < deadline:
            windows.step(int(windows.random.integers(*WINDOW_SIZES)))
            if windows.cost < cost - 1e-6 * abs(cost):
                last, cost = windows.steps, windows.cost
        self.search.offer(self.chains, windows.answer())


def _tighten(search: _Search, chains: Chains) -> Chains | None:
    """Chains of the model without strategies that reach the incumbent; None if nothing cheaper is left."""
    if search.best is None:
        return chains
    doomed = chains.least > search.incumbent - 1.0 + chains.tolerance
    if doomed.mean() < LEAST_DOOMED:
        return chains
    model = search.model
    prices = dict(zip(chains.rows.tolist(), chains.multipliers.tolist(), strict=True))
    try:
        for k, node in enumerate(chains.nodes):
            own = doomed[chains.first[k] : chains.first[k + 1]]
            if own.all():
                return None
            if own.any():
                model.restrict(node, np.flatnonzero(~own))
        shrink(model, search.deadline)
    except InfeasibleModelError:
        return None
    return Chains(model, np.array([prices[row] for row in model.rows.tolist()]))


def _branch(search: _Search, chains: Chains) -> None:
    improver = Improver(search, chains)

    def visit(choice: Integers | None) -> float:
        if choice is not None:
            search.offer(chains, evaluate(chains, choice))
            return search.incumbent
        improver.run(search.deadline, starts=1)
        return search.incumbent

    tree = Tree(chains, search.incumbent, visit)
    bound = tree.run(search.deadline, VISIT_EVERY)
    search.raise_bound(bound, chains.tolerance)
    search.is_exhausted = tree.is_complete
