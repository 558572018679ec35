"""Picking from stored plans against brute force, and stores that are damaged or of something else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError
from autopar.ir.mesh import stage_mesh
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.serialize import load_plan, save_plan
from autopar.ir.solution import Limits, Objective, Pins
from autopar.planner import replan as replanning
from autopar.planner.replan import Change, Means, replan
from autopar.planner.request import Target, choose_target
from autopar.planner.rival import request_of
from autopar.planner.store import INDEX_NAME, kept_in, read_store, recalled, remember, store_key, write_store
from tests.planner.plans import tiny_plan

STORED = Means(compute=False)


def variant(time_s: float, energy_j: float, ranks: int, clock_hz: float) -> Plan:
    """The tiny plan on 2 * ranks GPUs with other figures."""
    plan = tiny_plan()
    exact = {
        name: Quantity(value, unit, "modelled", value, value)
        for name, value, unit in (
            ("step_time_s", time_s, "s"),
            ("energy_j", energy_j, "J"),
            ("average_power_w", energy_j / time_s, "W"),
            ("peak_power_w", 1.3 * energy_j / time_s, "W"),
        )
    }
    stages = tuple(replace(stage, clock_hz=clock_hz) for stage in plan.decisions.stages)
    decisions = replace(plan.decisions, mesh=stage_mesh(ranks, 1), stages=stages)
    predicted = replace(plan.predicted, **exact)
    return replace(plan, decisions=decisions, predicted=predicted, limits=Limits(), objective=Objective("energy"))


def target() -> Target:
    return choose_target(request_of(tiny_plan(), Pins()))


figures = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.5])
variants = st.builds(variant, figures, figures, st.sampled_from([1, 2]), st.sampled_from([0.0, 1.2e9]))
changes = st.builds(
    Change,
    st.builds(
        Limits,
        deadline_s=st.none() | figures,
        average_power_w=st.none() | figures,
        peak_power_w=st.none() | figures,
    ),
    num_gpus=st.none() | st.integers(1, 4),
    energy_price=st.none() | st.just(0.0) | figures,
    gpu_hour_price=st.none() | figures,
    pue=st.none() | st.just(1.5),
    kind=st.none() | st.sampled_from(["time", "energy", "edp"]),
).filter(lambda change: change != Change() and (change.kind or change.energy_price is not None))


def worth(change: Change, plan: Plan) -> float:
    """The question's own arithmetic, written out."""
    time_s, energy_j = plan.predicted.step_time_s.value, plan.predicted.energy_j.value
    if change.kind is not None:
        return {"time": time_s, "energy": energy_j, "edp": time_s * energy_j}[change.kind]
    hours = (change.gpu_hour_price or 0.0) / 3600 * plan.decisions.num_gpus * time_s
    return hours + (change.pue or 1.0) * (change.energy_price or 0.0) / 3.6e6 * energy_j


def is_allowed(change: Change, plan: Plan) -> bool:
    limits, predicted = change.limits, plan.predicted
    pairs = (
        (predicted.step_time_s, limits.deadline_s),
        (predicted.average_power_w, limits.average_power_w),
        (predicted.peak_power_w, limits.peak_power_w),
    )
    within = all(most is None or figure.value <= most * (1 + 1e-6) for figure, most in pairs)
    return within and plan.decisions.num_gpus <= (change.num_gpus or 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(variants, min_size=1, max_size=6), changes)
def test_the_pick_is_the_best_that_is_allowed(
    tmp_path_factory: pytest.TempPathFactory, plans: list[Plan], change: Change
) -> None:
    directory = tmp_path_factory.mktemp("store")
    write_store(directory, store_key(plans[0], target()), {f"p{i}.json": plan for i, plan in enumerate(plans)})
    old = directory / "p0.json"
    allowed = [worth(change, plan) for plan in plans if is_allowed(change, plan)]
    if not allowed:
        with pytest.raises(InfeasibleError) as caught:
            replan(plans[0], old, change, STORED)
        assert caught.value.remedies[-1].change == "leave out --no-compute"
        return
    found = replan(plans[0], old, change, STORED)
    assert worth(change, found.plan) == pytest.approx(min(allowed), rel=1e-8, abs=1e-15)
    assert is_allowed(change, found.plan)
    assert found.plan.solver.objective == pytest.approx(min(allowed), rel=1e-8, abs=1e-15)
    assert found.how == ("kept" if found.plan.decisions == plans[0].decisions else "picked")
    save_plan(found.plan, directory / "new.json")
    assert load_plan(directory / "new.json") == found.plan


def stored(directory: Path) -> list[Plan]:
    plans = [variant(1.0, 4.0, 2, 0.0), variant(2.0, 3.0, 2, 1.2e9), variant(3.0, 2.0, 1, 0.0)]
    write_store(directory, store_key(plans[0], target()), {f"p{i}.json": plan for i, plan in enumerate(plans)})
    return plans


def test_what_is_needed_is_said(tmp_path: Path) -> None:
    plans = stored(tmp_path)
    with pytest.raises(InfeasibleError) as caught:
        replan(plans[0], tmp_path / "p0.json", Change(Limits(deadline_s=0.5)), STORED)
    assert [(r.quantity, r.value) for r in caught.value.remedies] == [("deadline_s", 1.0), ("", None)]
    with pytest.raises(InfeasibleError) as caught:
        replan(plans[0], tmp_path / "p0.json", Change(Limits(deadline_s=1.5), num_gpus=2), STORED)
    assert {r.quantity: r.value for r in caught.value.remedies[:-1]} == {"deadline_s": 3.0, "num_gpus": 4}


def test_plans_that_leave_clocks_alone_stay_so(tmp_path: Path) -> None:
    plans = stored(tmp_path)
    change = Change(Limits(deadline_s=2.5))
    assert replan(plans[0], tmp_path / "p0.json", change, STORED).plan.decisions == plans[1].decisions
    alone = replace(STORED, clocks="max")
    assert replan(plans[0], tmp_path / "p0.json", change, alone).plan.decisions == plans[0].decisions


def test_a_computed_plan_is_taken_only_if_it_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = stored(tmp_path)
    for energy_j, how in ((2.5, "picked"), (1.5, "computed")):
        made = variant(2.2, energy_j, 2, 1e9)
        monkeypatch.setattr(replanning, "_computed", lambda *_, made=made: made)
        found = replan(plans[0], tmp_path / "p0.json", Change(kind="energy"), Means(compute=True))
        assert found.how == how
        assert found.plan.predicted.energy_j.value == min(energy_j, 2.0)


def test_a_time_plan_under_a_deadline_is_asked_for_energy(tmp_path: Path) -> None:
    plans = stored(tmp_path)
    fast = replace(plans[0], objective=Objective("time"))
    found = replan(fast, tmp_path / "p0.json", Change(Limits(deadline_s=3.0)), STORED)
    assert found.plan.objective == Objective("energy")
    assert found.plan.decisions == plans[2].decisions


def test_prices_of_the_plan_are_kept_where_none_is_given(tmp_path: Path) -> None:
    plans = stored(tmp_path)
    priced = Objective("cost", energy_weight=1.2 * 0.1 / 3.6e6, gpu_second_weight=2 / 3600, pue=1.2)
    own = replace(plans[0], objective=priced)
    found = replan(own, tmp_path / "p0.json", Change(energy_price=0.3), STORED)
    assert found.plan.objective == replace(priced, energy_weight=pytest.approx(1.2 * 0.3 / 3.6e6))
    found = replan(own, tmp_path / "p0.json", Change(gpu_hour_price=7.2), STORED)
    assert found.plan.objective == replace(
        priced, gpu_second_weight=7.2 / 3600, energy_weight=pytest.approx(1.2e-1 / 3.6e6)
    )
    with pytest.raises(InputError, match="--grid-carbon"):
        replan(own, tmp_path / "p0.json", Change(kind="carbon"), STORED)
    with pytest.raises(InputError, match="nothing has changed"):
        replan(own, tmp_path / "p0.json", Change(), STORED)


def test_the_cache_gathers_plans_of_one_model_from_any_number_of_gpus() -> None:
    plans = [variant(1.0, 4.0, 2, 0.0), variant(3.0, 2.0, 1, 0.0)]
    here = target()
    fewer = choose_target(replace(request_of(tiny_plan(), Pins()), num_gpus=2, clocks="max"))
    remember(plans[:1], here)
    remember([*plans[1:], plans[1]], fewer)
    key = store_key(plans[0], here)
    assert key == store_key(plans[1], fewer)
    assert [s.load() for s in recalled(key)] == plans
    other = replace(plans[0], model=replace(plans[0].model, graph_hash="f" * 64))
    assert recalled(store_key(other, here)) == []
    assert (
        recalled(store_key(plans[0], choose_target(replace(request_of(tiny_plan(), Pins()), memory_bytes=2**30)))) == []
    )


def test_a_damaged_cache_is_empty_and_a_damaged_store_an_error(tmp_path: Path) -> None:
    plans, key = stored(tmp_path), store_key(tiny_plan(), target())
    index = tmp_path / INDEX_NAME
    whole = index.read_text()
    assert len(kept_in(tmp_path, key)) == len(plans)
    for text, message in (
        (whole[:-30], "not JSON"),
        (whole.replace('"store_version": 1', '"store_version": 9'), "store_version"),
        (whole.replace('"file": "p0.json"', '"file": "../p0.json"'), "outside"),
        (whole.replace('"num_gpus": 4', '"num_gpus": "4"', 1), "num_gpus"),
        ("[]", "store_version"),
    ):
        index.write_text(text)
        with pytest.raises(InputError, match=message):
            read_store(index)
    index.write_text(whole)
    with pytest.raises(InputError, match="another model"):
        kept_in(tmp_path, replace(key, graph_hash="f" * 64))
    (tmp_path / "p2.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="is not the plan"):
        replan(plans[0], tmp_path / "p0.json", Change(kind="energy"), replace(STORED, store=tmp_path))
    remember(plans, target())
    for file in (Path(s.directory) for s in recalled(key)):
        for json_file in file.glob("*.json"):
            json_file.write_text("{")
    assert recalled(key) == []


def test_every_figure_of_an_entry_is_finite(tmp_path: Path) -> None:
    stored(tmp_path)
    for entry in read_store(tmp_path / INDEX_NAME).entries:
        assert all(math.isfinite(x) for x in (entry.step_time_s, entry.energy_j, entry.average_power_w))
