"""The corner of objective, limits and planes against all crossings of their lines, with nothing left out."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.ir.solution import Limits, Objective
from autopar.search.aim import Aim, Plane
from autopar.search.cuts import Prices

OBJECTIVES = [Objective("time"), Objective("energy"), Objective("edp"), Objective("weighted", 3.0, 0.5)]
SLACK = 1e-9
angles = st.floats(0.0, math.pi / 2)
planes_strategy = st.lists(st.tuples(angles, st.floats(0.1, 10.0)), min_size=1, max_size=9)


def to_planes(found: list[tuple[float, float]]) -> list[Plane]:
    """Directions on a grid that has both axes."""
    steps = [round(angle / (math.pi / 2) * 16) for angle, _ in found]
    directions = [
        (float(k < 16) * math.cos(k * math.pi / 32), float(k > 0) * math.sin(k * math.pi / 32)) for k in steps
    ]
    return [Plane(Prices(a, b), level) for (a, b), (_, level) in zip(directions, found, strict=True)]


def least(aim: Aim, planes: list[Plane]) -> float:
    """Least objective over all crossings that no plane cuts off."""
    lines = [(p.prices.step_weight, p.prices.beta, p.level) for p in planes] + [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    headroom_w = aim.headroom_w
    if math.isfinite(headroom_w):
        lines.append((headroom_w, -1.0, 0.0))
    best = math.inf
    for (a1, b1, c1), (a2, b2, c2) in itertools.combinations(lines, 2):
        determinant = a1 * b2 - a2 * b1
        if abs(determinant) < 1e-12:
            continue
        time_s, dynamic_j = (c1 * b2 - c2 * b1) / determinant, (a1 * c2 - a2 * c1) / determinant
        above = all(p.prices.step_weight * time_s + p.prices.beta * dynamic_j >= p.level * (1 - SLACK) for p in planes)
        if time_s >= 0 and dynamic_j >= 0 and above:
            best = min(best, aim.value(time_s, dynamic_j))
    return best


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(found=planes_strategy, cap_w=st.sampled_from([None, 6.0, 50.0]))
def test_bound_is_the_least_vertex_of_all_planes(
    objective: Objective, found: list[tuple[float, float]], cap_w: float | None
) -> None:
    aim, planes = Aim(objective, Limits(average_power_w=cap_w), 2, 5.0), to_planes(found)
    expected = least(aim, planes)
    assert aim.bound(planes) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert aim.quick(planes) <= expected * (1 + 1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    found=planes_strategy,
    point=st.tuples(st.floats(0.01, 20.0), st.floats(0.01, 20.0)),
    limits=st.builds(
        Limits, st.sampled_from([None, 3.0]), st.sampled_from([None, 40.0]), st.sampled_from([None, 6.0, 9.0])
    ),
)
def test_no_plan_above_the_planes_beats_the_bound_or_passes_a_horizon(
    objective: Objective, found: list[tuple[float, float]], point: tuple[float, float], limits: Limits
) -> None:
    aim = Aim(objective, limits, 2, 5.0)
    planes = [Plane(p.prices, min(p.level, p.prices.step_weight * point[0] + p.prices.beta * point[1]))
              for p in to_planes(found)]  # fmt: skip
    value = aim.value(*point)
    assert aim.bound(planes) <= value * (1 + 1e-9)
    assert aim.quick(planes) <= value * (1 + 1e-9)
    if not math.isfinite(value):
        return
    for plane in planes:
        reached = plane.prices.step_weight * point[0] + plane.prices.beta * point[1]
        assert reached <= aim.horizon(plane.prices, planes, value * (1 + 1e-6)) * (1 + 1e-6)
    for prices, limit in aim.upper_limits(planes, value * (1 + 1e-6)):
        assert prices.step_weight * point[0] + prices.beta * point[1] <= limit * (1 + 1e-6)


def test_a_cap_below_the_fixed_power_leaves_nothing() -> None:
    aim = Aim(Objective("energy"), Limits(average_power_w=4.0), 2, 5.0)
    assert aim.value(1.0, 1.0) == math.inf
    assert aim.bound([Plane(Prices(1.0, 0.0), 1.0)]) == math.inf


def test_a_direction_is_worth_a_plane_only_beside_the_corner() -> None:
    aim = Aim(Objective("energy"), Limits(deadline_s=2.0), 2, 5.0)
    planes = [Plane(Prices(1.0, 0.0), 1.0), Plane(Prices(0.0, 1.0), 1.0), Plane(aim.natural, 8.0)]
    further = aim.next_direction(planes)
    assert further is not None
    assert further not in [p.prices for p in planes]
    assert Aim(Objective("time"), Limits(), 2, 5.0).next_direction(planes) is None
    assert aim.next_direction([*planes, Plane(Prices(1.0, 0.0), 9.0)]) is None


@pytest.mark.parametrize("level", [math.inf, -math.inf])
def test_planes_of_infinite_level_leave_nothing_or_say_nothing(level: float) -> None:
    aim = Aim(Objective("energy"), Limits(deadline_s=2.0), 2, 5.0)
    planes = [Plane(Prices(1.0, 0.0), 1.0), Plane(Prices(0.0, 1.0), level)]
    expected = math.inf if level > 0 else aim.bound(planes[:1])
    assert aim.bound(planes) == aim.bound(planes[::-1]) == expected
    assert aim.quick(planes) <= expected


def test_a_limit_out_of_reach_closes_without_a_corner() -> None:
    aim = Aim(Objective("energy"), Limits(deadline_s=2.0), 2, 5.0)
    assert aim.quick([Plane(Prices(1.0, 0.0), 2.1)]) == math.inf
    assert aim.quick([Plane(Prices(1.0, 0.0), 1.9)]) < math.inf
