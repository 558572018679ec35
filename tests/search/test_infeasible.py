"""What an infeasible answer says is needed, against the enumeration of all plans."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from autopar.cli.quantities import parse_seconds
from autopar.errors import InfeasibleError, Remedy
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.brute import Enumerated, enumerate_plans
from autopar.search.solve import search
from tests.strategies import FakeDevice, FakeSource, fake_sources

FEW = settings(
    max_examples=20, phases=[Phase.generate], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
NAMES = ("deadline_s", "energy_j", "average_power_w", "peak_power_w")


def within(plans: list[Enumerated], memory_bytes: float, limits: Limits) -> list[tuple[Enumerated, float, float]]:
    """Plans that keep everything, with time and energy as paced."""
    kept = [plan for plan in plans if plan.keeps(memory_bytes, limits)]
    return [(plan, *paced) for plan in kept if (paced := plan.paced(limits)) is not None]


def least(plans: list[Enumerated], memory_bytes: float, limits: Limits, name: str) -> float:
    """The least value of one limit that some plan keeps beside the others; inf if none does."""
    if name == "memory_bytes":
        return min((plan.peak_bytes for plan, _, _ in within(plans, math.inf, limits)), default=math.inf)
    found = within(plans, memory_bytes, replace(limits, **{name: None}))
    if name == "deadline_s":
        return min((time_s for _, time_s, _ in found), default=math.inf)
    if name == "energy_j":
        return min((energy_j for _, _, energy_j in found), default=math.inf)
    if name == "peak_power_w":
        return min((plan.peak_w for plan, _, _ in found), default=math.inf)
    return min((waited_w(plan, limits) for plan, _, _ in found), default=math.inf)


def waited_w(plan: Enumerated, limits: Limits) -> float:
    """Average power of a plan that waits until a limit stops it."""
    dynamic_j = plan.energy_j - plan.fixed_w * plan.time_s
    longest_s = min(
        math.inf if limits.deadline_s is None else limits.deadline_s,
        math.inf if limits.energy_j is None else (limits.energy_j - dynamic_j) / plan.fixed_w,
    )
    return plan.fixed_w + dynamic_j / longest_s


@st.composite
def tight_limits(draw: st.DrawFn, plans: list[Enumerated]) -> Limits:
    """One to three limits around or below what single plans reach."""
    names = draw(st.sets(st.sampled_from(NAMES), min_size=1, max_size=3))
    share = st.floats(0.3, 1.3)
    levels = {
        "deadline_s": min(plan.time_s for plan in plans),
        "energy_j": min(plan.energy_j for plan in plans),
        "average_power_w": min(plan.energy_j / plan.time_s for plan in plans),
        "peak_power_w": min(plan.peak_w for plan in plans),
    }
    return Limits(**{name: levels[name] * draw(share) for name in sorted(names)})


@FEW
@given(data=st.data(), source=fake_sources())
def test_ways_out_are_the_true_minima(data: st.DataObject, source: FakeSource) -> None:
    plans = list(enumerate_plans(source, pins=Pins()))
    memory_bytes = source.device.memory_bytes
    assume(within(plans, memory_bytes, Limits()))
    limits = data.draw(tight_limits(plans))
    assume(not within(plans, memory_bytes, limits))
    remedies = {remedy.quantity: remedy for remedy in no_plan(source, limits).remedies}
    for name in (*(n for n in NAMES if getattr(limits, n) is not None), "memory_bytes"):
        true = least(plans, memory_bytes, limits, name)
        assert (name in remedies) == math.isfinite(true), (name, true)
        if name in remedies:
            assert remedies[name].value == pytest.approx(true, rel=1e-3)
    check_devices(source, limits, remedies.get("num_gpus"))


def no_plan(source: FakeSource, limits: Limits) -> InfeasibleError:
    """The error of a search under limits that nothing keeps.

    Made-up tables do not scale as real ones do, so the bound that assumes it must not be used.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autopar.search.relaxations.MOST_GROWTH", 2)
        patch.setattr("autopar.search.shared.FEW_TABLES", 10**6)
        with pytest.raises(InfeasibleError) as caught:
            search(source, Objective("time"), pins=Pins(), limits=limits)
    return caught.value


def check_devices(source: FakeSource, limits: Limits, remedy: Remedy | None) -> None:
    """The number of devices named is enough, and one less is not."""
    if remedy is None or remedy.value is None or remedy.value > 4:
        return

    def is_enough(num_gpus: int) -> bool:
        more = replace(source, device=replace(source.device, num_gpus=num_gpus))
        return bool(within(list(enumerate_plans(more, pins=Pins())), source.device.memory_bytes, limits))

    assert is_enough(int(remedy.value))
    assert not is_enough(int(remedy.value) - 1)


def test_the_message_names_limit_need_have_and_a_value_that_works() -> None:
    source = next(
        source
        for seed in range(50)
        if (source := FakeSource(seed, (0, 1), 4, FakeDevice(10**6, 2)))
        and within(list(enumerate_plans(source, pins=Pins())), 10**6, Limits())
    )
    error = no_plan(source, Limits(deadline_s=1e-3))
    assert error.limit == "deadline"
    assert "1 ms" in error.have
    (remedy,) = (r for r in error.remedies if r.quantity == "deadline_s")
    flag, _, text = remedy.change.partition(" ")
    assert flag == "--deadline"
    assert "proven" in remedy.effect
    relaxed = Limits(deadline_s=parse_seconds(text))
    assert search(source, Objective("time"), pins=Pins(), limits=relaxed).time_s <= parse_seconds(text)
