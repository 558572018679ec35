"""Aim: the objective and the limits for one number of devices, in the plane of step time T and dynamic energy D.

With fixed power P of the devices used and their hosts, and a cap C on average power, a plan (T, D) gives

    T' = max(T, D / (C - P))          paced: it waits until its average power is C
    E' = D + P T'

and every objective and limit is a function of (T', E'). `Plane`s a T + b D >= level that hold for every plan of a
skeleton bound it: the least objective over the polygon that planes and limits leave is met at a vertex, because the
objective is linear or a product of two positive linear functions (quasi-concave) on each side of the line T = D/(C-P).
The same polygon tells the direction in which a further plane would help most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.ir.cost import Array
from autopar.ir.solution import Limits, Objective
from autopar.search.cuts import Prices

SLACK = 1e-9
"""Relative excess over a limit, or shortfall below a plane, that counts as rounding."""
CLOSEST = 1e-4
"""Least angle, radians, between two directions that are both worth a plane."""


@dataclass(frozen=True)
class Plane:
    """step_weight * T + beta * D >= level for every plan in question."""

    prices: Prices
    level: float


@dataclass(frozen=True)
class Aim:
    """See the module docstring. `fixed_w` is P, watts."""

    objective: Objective
    limits: Limits
    num_gpus: int
    fixed_w: float

    @cached_property
    def is_plain(self) -> bool:
        """One plane, the objective's own, says all there is to say."""
        limits = self.limits
        return self.objective.is_linear and limits.deadline_s is limits.energy_j is limits.average_power_w is None

    @property
    def headroom_w(self) -> float:
        """C - P, inf without a cap."""
        return math.inf if self.limits.average_power_w is None else self.limits.average_power_w - self.fixed_w

    @cached_property
    def natural(self) -> Prices:
        """The objective of an unpaced plan as a weighted sum of T and D; that of E for a product."""
        time_weight, energy_weight = self.objective.weights(self.num_gpus) if self.objective.is_linear else (0.0, 1.0)
        return Prices(time_weight + energy_weight * self.fixed_w, energy_weight)

    def paced_s(self, time_s: float, dynamic_j: float) -> float:
        """T'; inf where no waiting brings the average below the cap."""
        headroom = self.headroom_w
        if headroom <= 0:
            return math.inf
        return time_s if math.isinf(headroom) else max(time_s, dynamic_j / headroom)

    def value(self, time_s: float, dynamic_j: float) -> float:
        """Objective of a plan, inf where it breaks a limit."""
        paced = self.paced_s(time_s, dynamic_j)
        if not math.isfinite(paced):
            return math.inf
        energy_j = dynamic_j + self.fixed_w * paced
        limits = self.limits
        late = limits.deadline_s is not None and paced > limits.deadline_s * (1 + SLACK)
        greedy = limits.energy_j is not None and energy_j > limits.energy_j * (1 + SLACK)
        return math.inf if late or greedy else self.objective.value(paced, energy_j, self.num_gpus)

    def quick(self, planes: Sequence[Plane]) -> float:
        """A bound without looking for the corner: <= `bound`."""
        natural = self.natural
        least_s = max([0.0, *(p.level for p in planes if p.prices == Prices(1.0, 0.0))])
        least_j = max([0.0, *(p.level for p in planes if p.prices == Prices(0.0, 1.0))])
        if any(p.level == math.inf for p in planes):
            return math.inf
        if not self.is_plain and not math.isfinite(self.value(least_s, least_j)):
            return math.inf
        if not self.objective.is_linear:
            return self.value(least_s, least_j)
        return max((p.level for p in planes if p.prices == natural), default=-math.inf)

    def bound(self, planes: Sequence[Plane]) -> float:
        """Least objective that the planes leave, inf if they leave nothing."""
        return self.corner(planes)[0]

    def corner(self, planes: Sequence[Plane]) -> tuple[float, tuple[float, float]]:
        """Least objective over the polygon and the vertex (T, D) that has it."""
        if self.is_plain and planes:
            own = [p for p in planes if p.prices == self.natural]
            if len(own) == len(planes):
                return max(p.level for p in own), (0.0, 0.0)
        if any(math.isinf(p.level) and p.level > 0 for p in planes) or self.headroom_w <= 0:
            return math.inf, (math.inf, math.inf)
        planes = _binding(planes)
        lines = self._lines(planes)
        best = (math.inf, (math.inf, math.inf))
        for time_s, dynamic_j in _crossings(lines).tolist():
            value = self.value(time_s, dynamic_j)
            if value < best[0] and _above(planes, time_s, dynamic_j):
                best = (value, (time_s, dynamic_j))
        return best

    def _lines(self, planes: Sequence[Plane]) -> Array:
        """[line, 3]: a T + b D = c of planes, axes, limits and the pacing line."""
        lines = [(p.prices.step_weight, p.prices.beta, p.level) for p in planes if math.isfinite(p.level)]
        lines += [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
        headroom, limits = self.headroom_w, self.limits
        paced = math.isfinite(headroom)
        if paced:
            lines.append((headroom, -1.0, 0.0))
        if limits.deadline_s is not None:
            lines.append((1.0, 0.0, limits.deadline_s))
            if paced:
                lines.append((0.0, 1.0, limits.deadline_s * headroom))
        if limits.energy_j is not None:
            lines.append((self.fixed_w, 1.0, limits.energy_j))
            if paced:
                lines.append((0.0, 1.0, limits.energy_j / (1 + self.fixed_w / headroom)))
        return np.array(lines, dtype=np.float64)

    def upper_limits(self, planes: Sequence[Plane], cutoff: float) -> list[tuple[Prices, float]]:
        """Weighted sums of T and D, other than the objective, and their most for a plan below `cutoff`."""
        if self.is_plain:
            return []
        headroom, limits = self.headroom_w, self.limits
        found: list[tuple[Prices, float]] = []
        dynamic_j = math.inf
        if limits.deadline_s is not None:
            found.append((Prices(1.0, 0.0), limits.deadline_s))
            dynamic_j = limits.deadline_s * headroom
        if limits.energy_j is not None:
            found.append((Prices(self.fixed_w, 1.0), limits.energy_j))
            dynamic_j = min(dynamic_j, limits.energy_j / (1 + self.fixed_w / headroom))
        if self.objective.is_linear and math.isfinite(headroom):
            time_weight, energy_weight = self.objective.weights(self.num_gpus)
            per_joule = time_weight / headroom + energy_weight * (1 + self.fixed_w / headroom)
            dynamic_j = min(dynamic_j, cutoff / per_joule)
        if not self.objective.is_linear and math.isfinite(headroom):
            dynamic_j = min(dynamic_j, math.sqrt(cutoff * headroom / (1 + self.fixed_w / headroom)))
        if math.isfinite(dynamic_j):
            found.append((Prices(0.0, 1.0), dynamic_j))
        if not self.objective.is_linear and math.isfinite(cutoff):
            found += self._product_box(planes, cutoff)
        return found

    def horizon(self, prices: Prices, planes: Sequence[Plane], cutoff: float) -> float:
        """Most that step_weight * T + beta * D can be for a plan on the right side of everything, below `cutoff`.

        A relaxation in the direction `prices` that reaches the horizon leaves no plan of interest.
        """
        natural = self.natural
        if self.is_plain and prices == natural:
            return cutoff
        region = self.upper_limits(planes, cutoff)
        if self.objective.is_linear and math.isfinite(cutoff):
            region.append((natural, cutoff))
        return _most(prices, region)

    def _product_box(self, planes: Sequence[Plane], cutoff: float) -> list[tuple[Prices, float]]:
        """Upper limits on T and D of plans with T E < cutoff, from the least T and D that the planes allow."""
        least_s = max((p.level / p.prices.step_weight for p in planes if p.prices.beta == 0), default=0.0)
        least_j = max((p.level / p.prices.beta for p in planes if p.prices.step_weight == 0), default=0.0)
        if least_s <= 0:
            return []
        power = self.fixed_w
        box = [(Prices(0.0, 1.0), max(cutoff / least_s - power * least_s, 0.0))]
        if power > 0:
            most_s = (-least_j + math.sqrt(least_j**2 + 4 * power * cutoff)) / (2 * power)
            box.append((Prices(1.0, 0.0), most_s))
        return box

    @cached_property
    def probes(self) -> tuple[Prices, ...]:
        """Directions to begin with."""
        if self.is_plain:
            return (self.natural,)
        own = [self.natural] if self.objective.is_linear else []
        return tuple(dict.fromkeys([*own, Prices(1.0, 0.0), Prices(0.0, 1.0)]))

    def closest(self, planes: Sequence[Plane], cutoff: float) -> Prices:
        """The direction whose plane is nearest to leaving no plan below `cutoff`."""
        if self.is_plain or not planes:
            return self.natural

        def share(plane: Plane) -> float:
            horizon = self.horizon(plane.prices, planes, cutoff)
            return plane.level / horizon if math.isfinite(horizon) and horizon > 0 else -math.inf

        best = max(planes, key=share)
        return best.prices if share(best) > -math.inf else self.natural

    def next_direction(self, planes: Sequence[Plane]) -> Prices | None:
        """Where one more plane would cut off the corner; None where directions already lie too close."""
        _, corner = self.corner(planes)
        if self.is_plain or not math.isfinite(corner[0]):
            return None
        scale = max(self.fixed_w, 1e-300)
        if not self.objective.is_linear:
            steepest = self._gradient(*corner)
            angle = _angle(steepest, scale)
            if all(abs(angle - _angle(p.prices, scale)) > CLOSEST for p in planes):
                return steepest
        angles = sorted({_angle(p.prices, scale) for p in planes})
        active = sorted(
            {
                _angle(p.prices, scale)
                for p in planes
                if _level(p.prices, *corner) <= p.level + 1e-7 * max(abs(p.level), 1e-300)
            }
        )
        gaps = [gap for gap in itertools.pairwise(angles) if gap[1] - gap[0] > CLOSEST and set(gap) & set(active)]
        if not gaps:
            return None
        both = [gap for gap in gaps if gap[0] in active and gap[1] in active]
        low, high = max(both or gaps, key=lambda gap: (gap[1] - gap[0], -gap[0]))
        middle = (low + high) / 2
        return Prices(math.cos(middle) * scale, math.sin(middle))

    def _gradient(self, time_s: float, dynamic_j: float) -> Prices:
        """Direction in which the product T' E' grows fastest, where the plan is not paced."""
        prices = (dynamic_j + 2 * self.fixed_w * time_s, time_s)
        size = max(*prices, 1e-300)
        return Prices(prices[0] / size, prices[1] / size)


def _angle(prices: Prices, scale: float) -> float:
    return math.atan2(prices.beta, prices.step_weight / scale)


def _level(prices: Prices, time_s: float, dynamic_j: float) -> float:
    return prices.step_weight * time_s + prices.beta * dynamic_j


def _above(planes: Sequence[Plane], time_s: float, dynamic_j: float) -> bool:
    return all(_level(p.prices, time_s, dynamic_j) >= p.level - SLACK * abs(p.level) for p in planes)


def _binding(planes: Sequence[Plane]) -> list[Plane]:
    """The planes without those that others make redundant in the first quadrant: an upper envelope of T over D."""
    flat = [p for p in planes if p.prices.step_weight <= 0 and math.isfinite(p.level)]
    found: list[Plane] = [max(flat, key=lambda p: p.level / p.prices.beta)] if flat else []
    lines = [
        (-p.prices.beta / p.prices.step_weight, p.level / p.prices.step_weight, i)
        for i, p in enumerate(planes)
        if p.prices.step_weight > 0 and math.isfinite(p.level)
    ]
    stack: list[tuple[float, float, int]] = []
    for slope, height, index in sorted(lines):
        if stack and stack[-1][0] == slope:
            stack.pop()
        while stack and height >= stack[-1][1]:
            stack.pop()
        while len(stack) > 1:
            (m1, c1, _), (m2, c2, _) = stack[-2:]
            if (c1 - height) * (m2 - m1) > (c1 - c2) * (slope - m1):
                break
            stack.pop()
        stack.append((slope, height, index))
    return found + [planes[index] for _, _, index in stack]


def _crossings(lines: Array) -> Array:
    """[point, 2]: all crossings of two lines in the closed first quadrant."""
    first, second = np.triu_indices(len(lines), 1)
    a1, b1, c1 = lines[first].T
    a2, b2, c2 = lines[second].T
    determinant = a1 * b2 - a2 * b1
    size = (np.abs(a1) + np.abs(b1)) * (np.abs(a2) + np.abs(b2))
    apart = np.abs(determinant) > 1e-14 * size
    a1, b1, c1, a2, b2, c2, determinant = (x[apart] for x in (a1, b1, c1, a2, b2, c2, determinant))
    points = np.stack([(c1 * b2 - c2 * b1) / determinant, (a1 * c2 - a2 * c1) / determinant], axis=1)
    inside: Array = points[(points >= 0).all(axis=1)]
    return inside


def _most(prices: Prices, region: Sequence[tuple[Prices, float]]) -> float:
    """Maximum of step_weight * T + beta * D over T, D >= 0 and the upper limits of `region`."""
    needs_s, needs_j = prices.step_weight > 0, prices.beta > 0
    if needs_s and not any(p.step_weight > 0 for p, _ in region):
        return math.inf
    if needs_j and not any(p.beta > 0 for p, _ in region):
        return math.inf
    lines = np.array([(p.step_weight, p.beta, level) for p, level in region] + [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
    best = 0.0
    for time_s, dynamic_j in _crossings(lines).tolist():
        if all(_level(p, time_s, dynamic_j) <= level * (1 + SLACK) for p, level in region):
            best = max(best, _level(prices, time_s, dynamic_j))
    return best
