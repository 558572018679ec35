"""Instructions with choices on a precedence graph: earliest and latest times, filling of slack, local improvement.

A choice is the index into the instruction's options, which ascend in time and descend in effective energy. All
functions are deterministic; improvement counts its tries, not seconds.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

SEED = 1
FLOAT_SLACK = 1e-12
"""Share of the deadline kept clear when slack is filled, against rounding of sums."""
LARGEST_MOVE = 9
"""Most instructions sped up at once in one try."""


@dataclass(frozen=True)
class Network:
    """What there is to choose.

    Attributes:
        times_s, energies_j: per instruction, its options' times (ascending) and effective energies (descending).
        before, after: per instruction, pairs (neighbour, delay in seconds) along the arcs.
        order: a topological order.
        waiting_w: power of all GPUs while they wait, and of all else that is drawn until the step ends.
        least_step_s: this power is drawn at least this long, even if the instructions end sooner.
    """

    times_s: tuple[tuple[float, ...], ...]
    energies_j: tuple[tuple[float, ...], ...]
    before: tuple[tuple[tuple[int, float], ...], ...]
    after: tuple[tuple[tuple[int, float], ...], ...]
    order: tuple[int, ...]
    waiting_w: float
    least_step_s: float = 0.0

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Where each instruction stands in `order`."""
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    def spans_s(self, choices: Sequence[int]) -> list[float]:
        """Duration of every instruction."""
        return [times[c] for times, c in zip(self.times_s, choices, strict=True)]

    def finishes_s(self, choices: Sequence[int]) -> list[float]:
        """Earliest finish of every instruction."""
        finish = [0.0] * len(choices)
        self.update_finishes(finish, self.spans_s(choices), 0)
        return finish

    def update_finishes(self, finish: list[float], spans_s: Sequence[float], position: int) -> None:
        """Recompute the finishes of `order[position:]`."""
        before = self.before
        for v in self.order[position:]:
            start = 0.0
            for u, delay in before[v]:
                ready = finish[u] + delay
                if ready > start:  # noqa: PLR1730 (the innermost loop: a call of max doubles its time)
                    start = ready
            finish[v] = start + spans_s[v]

    def latest_s(self, choices: Sequence[int], deadline_s: float) -> list[float]:
        """Latest finish of every instruction that still meets the deadline."""
        latest = [deadline_s] * len(choices)
        self.update_latest(latest, self.spans_s(choices), deadline_s, len(choices))
        return latest

    def update_latest(self, latest: list[float], spans_s: Sequence[float], deadline_s: float, stop: int) -> None:
        """Recompute the latest finishes of `order[:stop]`."""
        after = self.after
        for v in reversed(self.order[:stop]):
            limit = deadline_s
            for w, delay in after[v]:
                must = latest[w] - spans_s[w] - delay
                if must < limit:  # noqa: PLR1730
                    limit = must
            latest[v] = limit

    def makespan_s(self, choices: Sequence[int]) -> float:
        """Finish of the last instruction."""
        return max(self.finishes_s(choices))

    def energy_j(self, choices: Sequence[int]) -> float:
        """Effective energy of the choices plus the power of waiting over the step."""
        dynamic = sum(energies[c] for energies, c in zip(self.energies_j, choices, strict=True))
        return dynamic + self.waiting_w * max(self.makespan_s(choices), self.least_step_s)


class _State:
    """Choices (changed in place) with their finishes and latest finishes, kept up to date."""

    def __init__(self, network: Network, choices: list[int], deadline_s: float) -> None:
        self._network, self._choices, self._deadline_s = network, choices, deadline_s
        self._spans_s = network.spans_s(choices)
        self.finish_s = network.finishes_s(choices)
        self.latest_s = network.latest_s(choices, deadline_s)

    def choose(self, v: int, choice: int) -> None:
        """Change one choice."""
        network, position = self._network, self._network.positions[v]
        self._choices[v] = choice
        self._spans_s[v] = network.times_s[v][choice]
        network.update_finishes(self.finish_s, self._spans_s, position)
        network.update_latest(self.latest_s, self._spans_s, self._deadline_s, position + 1)


def round_down(network: Network, durations_s: Sequence[float]) -> list[int]:
    """The slowest option of every instruction within its duration; within float noise counts as within."""
    return [
        max(0, bisect.bisect_right(times, d * (1 + 1e-9)) - 1)
        for times, d in zip(network.times_s, durations_s, strict=True)
    ]


def round_to_finishes(network: Network, latest_s: Sequence[float]) -> list[int]:
    """In topological order, the slowest option that ends by the instruction's time: leftover time moves on."""
    choices = [0] * len(latest_s)
    finish = [0.0] * len(latest_s)
    for v in network.order:
        start = max((finish[u] + delay for u, delay in network.before[v]), default=0.0)
        times = network.times_s[v]
        choices[v] = max(0, bisect.bisect_right(times, (latest_s[v] - start) * (1 + 1e-9)) - 1)
        finish[v] = start + times[choices[v]]
    return choices


def repair(network: Network, choices: list[int], deadline_s: float) -> None:
    """Speed up critical instructions, cheapest first, until the deadline is met; the fastest choices must meet it."""
    state = _State(network, choices, deadline_s)
    while max(state.finish_s) > deadline_s:
        best_j, best_v = math.inf, -1
        for v, choice in enumerate(choices):
            if choice and state.finish_s[v] > state.latest_s[v]:
                price_j = network.energies_j[v][choice - 1] - network.energies_j[v][choice]
                if price_j < best_j:
                    best_j, best_v = price_j, v
        if best_v < 0:
            choices[:] = [0] * len(choices)
            return
        state.choose(best_v, choices[best_v] - 1)


def fill(network: Network, choices: list[int], deadline_s: float, *, by_rate: bool = False, keep: int = -1) -> None:
    """Slow instructions down within their slack until none fits, the largest saving (or saving per second) first.

    Args:
        keep: an instruction that stays as it is.
    """
    clear_s = deadline_s * FLOAT_SLACK
    state = _State(network, choices, deadline_s)
    while True:
        best, best_v, best_choice = 0.0, -1, 0
        for v, choice in enumerate(choices):
            times = network.times_s[v]
            limit = times[choice] + state.latest_s[v] - state.finish_s[v] - clear_s
            if choice + 1 == len(times) or times[choice + 1] > limit or v == keep:
                continue
            slower = bisect.bisect_right(times, limit, choice + 1) - 1
            saving = network.energies_j[v][choice] - network.energies_j[v][slower]
            worth = saving / (times[slower] - times[choice]) if by_rate else saving
            if worth > best:
                best, best_v, best_choice = worth, v, slower
        if best_v < 0:
            return
        state.choose(best_v, best_choice)


def improve(network: Network, choices: list[int], deadline_s: float, tries: int) -> list[int]:
    """Speed up a few instructions along a random walk of the graph, fill the slack anew, keep what is not worse."""
    generator = random.Random(SEED)
    neighbours = [
        sorted({u for u, _ in before} | {w for w, _ in after})
        for before, after in zip(network.before, network.after, strict=True)
    ]
    best, best_j = list(choices), network.energy_j(choices)
    for _ in range(tries):
        trial = list(best)
        first = at = generator.randrange(len(trial))
        for _ in range(generator.randrange(1, LARGEST_MOVE)):
            trial[at] = max(0, trial[at] - generator.randrange(1, 3))
            if neighbours[at]:
                at = generator.choice(neighbours[at])
        fill(network, trial, deadline_s, by_rate=generator.random() < 0.5, keep=first)
        fill(network, trial, deadline_s)
        trial_j = network.energy_j(trial)
        if trial_j <= best_j and network.makespan_s(trial) <= deadline_s:
            best, best_j = trial, trial_j
    return best
