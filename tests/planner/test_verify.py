"""`ir.verify`: a plan that fits has no issue; each thing that does not fit is found by its path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from autopar.ir.placement import shard
from autopar.ir.plan import Plan
from autopar.ir.solution import Decisions, StageChoice
from autopar.ir.verify import verify
from tests.planner.plans import tiny_graph, tiny_plan


@dataclass(frozen=True)
class FakeDevice:
    memory_bytes: int = 80 * 2**30
    blocked_w: float = 100.0
    host_w_per_node: float = 400.0
    num_gpus: int = 4
    gpus_per_node: int = 8


def test_a_fitting_plan_has_no_issue() -> None:
    assert verify(tiny_plan(), tiny_graph(), FakeDevice()) == []


def _decisions(change: Callable[[Decisions], dict[str, Any]]) -> Plan:
    plan = tiny_plan()
    return replace(plan, decisions=replace(plan.decisions, **change(plan.decisions)))


MISFITS = {
    "$.decisions.ops.linear": lambda d: {"ops": {"sum_1": d.ops["sum_1"]}},
    "$.decisions.ops.extra": lambda d: {"ops": {**d.ops, "extra": d.ops["linear"]}},
    "$.decisions.ops.sum_1": lambda d: {"ops": {**d.ops, "sum_1": d.ops["linear"]}},
    "$.decisions.parameters.w": lambda d: {"parameters": {}},
    "$.decisions.hubs.ghost": lambda d: {"hubs": {"ghost": (shard(0), shard(0))}},
    "$.decisions.hubs.linear": lambda d: {"hubs": {"linear": (shard(5), shard(0))}},
    "$.decisions.stages[0].stop": lambda d: {"stages": (StageChoice(0, 1, "none"),)},
}


@pytest.mark.parametrize("path", MISFITS)
def test_each_misfit_is_found_by_its_path(path: str) -> None:
    plan = _decisions(MISFITS[path])
    if path.startswith("$.decisions.stages"):
        one = plan.predicted.stages[:1]
        plan = replace(
            plan, predicted=replace(plan.predicted, stages=one, peak_memory_bytes=(one[0].peak_memory_bytes,))
        )
    assert path in {issue.path for issue in verify(plan, tiny_graph(), FakeDevice())}


def test_another_batch_is_found() -> None:
    assert [issue.path for issue in verify(tiny_plan(), tiny_graph(16))] == ["$.model.batch_size"]


def test_too_little_memory_is_found() -> None:
    issues = verify(tiny_plan(), tiny_graph(), FakeDevice(memory_bytes=2**20))
    assert [issue.path for issue in issues] == [f"$.predicted.peak_memory_bytes[{i}]" for i in (0, 1)]


def test_too_few_gpus_are_found() -> None:
    assert [i.path for i in verify(tiny_plan(), tiny_graph(), FakeDevice(num_gpus=2))] == ["$.decisions"]


def _in_chunks(**changes: Any) -> list[str]:
    """Paths of the issues in the decisions of a plan of four chunks on two ranks."""
    plan = tiny_plan()
    chunks = tuple(StageChoice(i, i + 1, "none") for i in range(4))
    decisions = replace(plan.decisions, stages=chunks, interleave=2, num_microbatches=4, schedule="1f1b")
    predicted = replace(plan.predicted, stages=plan.predicted.stages[:1] * 4)
    issues = verify(replace(plan, decisions=replace(decisions, **changes), predicted=predicted))
    return [issue.path for issue in issues if not issue.path.startswith("$.predicted.peak_memory")]


def test_zero_bubble_needs_microbatches_in_equal_rounds() -> None:
    plan = tiny_plan()
    for count, expected in ((2, []), (1, ["$.decisions.num_microbatches"]), (7, ["$.decisions.num_microbatches"])):
        decisions = replace(plan.decisions, schedule="zero-bubble", num_microbatches=count)
        model = replace(plan.model, batch_size=14)
        found = verify(replace(plan, decisions=decisions, model=model))
        assert [issue.path for issue in found] == expected


def test_interleaved_chunks_need_1f1b_divisible_microbatches_and_one_device_per_rank() -> None:
    assert _in_chunks() == []
    assert _in_chunks(interleave=4) == ["$.decisions.interleave"]
    assert _in_chunks(interleave=3) == ["$.decisions.interleave"]
    assert _in_chunks(schedule="gpipe") == ["$.decisions.interleave"]
    assert _in_chunks(num_microbatches=1) == ["$.decisions.interleave"]
    clocks = tuple(StageChoice(i, i + 1, "none", clock_hz=1e9 * (i == 2)) for i in range(4))
    assert _in_chunks(stages=clocks) == ["$.decisions.stages[2]"]
