"""Even cuts and interleaved chunks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.errors import InputError
from autopar.ir.graph import OpGraph
from autopar.ir.solution import Pins
from autopar.planner.cuts import even_starts
from autopar.planner.estimate import price_configuration
from autopar.planner.request import PlanRequest

OPTIONS = {"layers": "6", "hidden": "32", "heads": "2", "seq": "16", "vocab": "64"}


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return capture(load_source("gpt", OPTIONS), batch_size=8).graph


def test_each_part_holds_equally_many_layers(graph: OpGraph) -> None:
    names = [block.name for block in graph.blocks]
    for parts in (1, 2, 3, 6):
        starts = (*even_starts(graph, parts), len(names))
        counts = [sum(name.startswith("layers.") for name in names[a:b]) for a, b in itertools.pairwise(starts)]
        assert counts == [6 // parts] * parts


def test_what_does_not_divide_leaves_less_to_the_last_parts(graph: OpGraph) -> None:
    starts = even_starts(graph, 4)
    layers = [graph.blocks[start].name for start in starts[1:]]
    assert layers == ["layers.2", "layers.4", "layers.5"]


def test_more_parts_than_layers_are_refused(graph: OpGraph) -> None:
    with pytest.raises(InputError, match="6 repeated blocks"):
        even_starts(graph, 7)


def test_chunks_lie_in_turn_on_the_ranks_and_cost_fewer_bubbles() -> None:
    def plan(interleave: int) -> float:
        pins = Pins(pp=2, dp=1, tp=1, num_microbatches=4, recompute="none", interleave=interleave, even_cuts=True)
        request = PlanRequest(2, gpu="a100-sxm-80gb", pins=pins, batch_size=8, profile="none", clocks="max")
        found = price_configuration("gpt", {**OPTIONS, "hidden": "1024", "heads": "8"}, request).planned.plan
        assert found.decisions.num_gpus == 2
        assert len(found.decisions.stages) == 2 * interleave
        assert len(found.predicted.peak_memory_bytes) == 2
        return found.predicted.step_time_s.value

    assert plan(3) < plan(1)


def test_a_split_backward_is_taken_where_pinned_alone() -> None:
    def plan(schedule: str | None, count: int = 4) -> tuple[str, float]:
        pins = Pins(pp=4, dp=1, tp=1, num_microbatches=count, recompute="none", interleave=1, schedule=schedule)
        request = PlanRequest(4, gpu="a100-sxm-80gb", pins=pins, batch_size=8, profile="none", clocks="max")
        found = price_configuration("gpt", {**OPTIONS, "hidden": "1024", "heads": "8"}, request).planned.plan
        return found.decisions.schedule, found.predicted.step_time_s.value

    found, split, plain = plan(None), plan("zero-bubble"), plan("1f1b")
    assert (split[0], plain[0]) == ("zero-bubble", "1f1b")
    assert found == plain
    assert split[1] < plain[1], "the bubbles of four stages at four microbatches are nearly half of the step"
    with pytest.raises(InputError, match="a multiple of 4, not 2"):
        plan("zero-bubble", 2)


def test_chunks_need_microbatches_that_divide_over_the_ranks() -> None:
    pins = Pins(pp=4, dp=1, tp=1, num_microbatches=2, interleave=1, even_cuts=True)
    request = PlanRequest(4, gpu="a100-sxm-80gb", pins=pins, batch_size=8, profile="none", clocks="max")
    assert price_configuration("gpt", OPTIONS, request).planned.plan.decisions.num_ranks == 4
    with pytest.raises(InputError, match="divide over the stages"):
        price_configuration("gpt", {**OPTIONS, "layers": "8"}, replace(request, pins=replace(pins, interleave=2)))
