"""What a plan was pinned to: written, read, kept where it is planned again, and dropped where it must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cli.pins import parse_pins
from autopar.errors import InfeasibleError, InputError, PlanMismatchError
from autopar.ir.pin_fields import parse_pin_fields, pin_fields, pin_words
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, parse_plan, plan_json
from autopar.ir.solution import Limits, Objective, Pins
from autopar.planner import again as planning_again
from autopar.planner import replan as replanning
from autopar.planner.again import plan_again
from autopar.planner.replan import Change, Means, replan
from autopar.planner.request import PlanRequest
from autopar.planner.rival import made_under, request_of
from autopar.planner.store import write_store
from autopar.report.text import plan_report
from tests.planner.plans import tiny_plan
from tests.planner.test_replan import STORED, store_key, target, variant

some = st.none() | st.integers(1, 8)
pins = st.builds(
    Pins,
    dp=some, tp=some, pp=some, num_microbatches=some, zero=st.none() | st.integers(0, 3),
    recompute=st.none() | st.sampled_from(["none", "full"]), sequence=st.none() | st.booleans(), roles=st.booleans(),
    without=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    ops=st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=2).map(tuple),
    meshes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=2).map(tuple),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(pins)
def test_pins_come_back_from_a_plan_file(found: Pins) -> None:
    assert parse_pin_fields(pin_fields(found)) == found
    plan = replace(tiny_plan(), pinned=pin_fields(found))
    again = parse_plan(dump_plan(plan))
    assert again == plan
    assert made_under(again) == found


def test_a_file_without_pins_is_as_before_and_free() -> None:
    plan = tiny_plan()
    assert pin_fields(Pins()) is None
    assert "pinned" not in plan_json(plan)
    assert made_under(plan) == Pins()
    assert "Pinned" not in plan_report(plan)
    assert "Pinned      dp=2, recompute=full" in plan_report(
        replace(plan, pinned=pin_fields(Pins(dp=2, recompute="full")))
    )


@pytest.mark.parametrize("fields", [{"dq": "1"}, {"dp": '"two"'}, {"dp": "{"}, {"ops": "[[1]]"}])
def test_pins_that_nobody_wrote_are_refused_by_name(fields: dict[str, str]) -> None:
    with pytest.raises(PlanMismatchError, match=f"{next(iter(fields))}|JSON"):
        made_under(replace(tiny_plan(), pinned=fields))


def test_pins_are_told_as_they_are_typed() -> None:
    typed = "dp=2,tp=1,m=8,recompute=full,vpp=2,sp=off,op:.*mlp.*=columns"
    found = parse_pins(typed, 64).pins
    words = pin_words(pin_fields(found) or {})
    assert sorted(words.split(", ")) == sorted(typed.split(","))
    assert parse_pins(words.replace(", ", ","), 64).pins == found


def test_stored_plans_count_only_under_the_same_pins(tmp_path: Path) -> None:
    fields = pin_fields(Pins(recompute="none"))
    old, other, free = (variant(2.0, 3.0, 1, 0.0), variant(1.0, 2.0, 2, 0.0), variant(1.0, 1.0, 2, 0.0))
    old, other = replace(old, pinned=fields), replace(other, pinned=fields)
    write_store(tmp_path, store_key(old, target()), {"p0.json": old, "p1.json": other, "p2.json": free})
    change = Change(kind="energy")
    kept = replan(old, tmp_path / "p0.json", change, STORED)
    assert (kept.plan.predicted.energy_j.value, kept.plan.pinned, kept.num_stored) == (2.0, fields, 2)
    dropped = replan(old, tmp_path / "p0.json", change, replace(STORED, pins=Pins()))
    assert (dropped.plan.predicted.energy_j.value, dropped.num_stored) == (1.0, 3)
    assert replan(free, tmp_path / "p2.json", change, STORED).num_stored == 3


def test_a_search_keeps_the_pins_and_says_how_to_drop_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Pins] = []

    def refuse(command: SimpleNamespace, _progress: object = None) -> None:
        asked.append(command.request.pins)
        raise InfeasibleError("memory", "2 GiB", "1 GiB")

    monkeypatch.setattr(replanning, "finished_plan", refuse)
    plan = replace(tiny_plan(), pinned=pin_fields(Pins(dp=2, tp=1)))
    (tmp_path / "p.json").write_text(dump_plan(plan))
    with pytest.raises(InfeasibleError, match=r"--unpin: .*dp=2, tp=1"):
        replan(plan, tmp_path / "p.json", Change(num_gpus=2), Means(compute=True))
    with pytest.raises(InfeasibleError) as caught:
        replan(plan, tmp_path / "p.json", Change(num_gpus=2), Means(compute=True, pins=Pins()))
    assert not caught.value.remedies
    assert asked == [Pins(dp=2, tp=1), Pins()]

    def no_mesh(*_: object) -> None:
        raise InputError("no mesh with dp=2")

    monkeypatch.setattr(replanning, "finished_plan", no_mesh)
    with pytest.raises(InputError, match="no mesh with dp=2; the plan is pinned to dp=2, tp=1: --unpin"):
        replan(plan, tmp_path / "p.json", Change(num_gpus=1), Means(compute=True))


def after_a_failure(monkeypatch: pytest.MonkeyPatch, plan: Plan, fits: Pins) -> tuple[list[Pins], list[str]]:
    """Pins that are tried until those that fit, and what is said."""
    tried: list[Pins] = []

    def search(command: SimpleNamespace) -> SimpleNamespace:
        request: PlanRequest = command.request
        tried.append(request.pins)
        if request.pins != fits:
            raise InfeasibleError("memory", "2 GiB", "1 GiB")
        return SimpleNamespace(plan_text=dump_plan(replace(plan, pinned=pin_fields(fits))))

    monkeypatch.setattr(planning_again, "finished_plan", search)
    said: list[str] = []
    plan_again(plan, 3, said.append)
    return tried, said


def test_after_a_failure_pins_are_kept_as_long_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    count = tiny_plan().decisions.num_microbatches
    own = Pins(dp=2, tp=1, recompute="full", ops=(("a.*", "columns"),))
    plan = replace(tiny_plan(), pinned=pin_fields(own))
    tried, said = after_a_failure(monkeypatch, plan, replace(own, num_microbatches=count))
    assert tried == [replace(own, num_microbatches=count)]
    assert not any("pinned" in line for line in said)
    loose = Pins(recompute="full", ops=own.ops)
    tried, said = after_a_failure(monkeypatch, plan, loose)
    assert tried == [replace(own, num_microbatches=count), replace(loose, num_microbatches=count), loose]
    assert said[0] == "no plan for 3 processes keeps all that was pinned; now free: dp, tp"
    tried, _ = after_a_failure(monkeypatch, plan, Pins())
    assert tried[-1] == Pins()
    tried, said = after_a_failure(monkeypatch, tiny_plan(), Pins())
    assert tried == [Pins(num_microbatches=count), Pins()]


def test_the_request_that_a_plan_answers_has_its_pins() -> None:
    plan = replace(tiny_plan(), pinned=pin_fields(Pins(zero=0)), limits=Limits(), objective=Objective("energy"))
    assert request_of(plan, made_under(plan)).pins == Pins(zero=0)
