"""Plans that the search emits for made-up networks compute the serial step, in float64, on real processes.

Each example of hypothesis is a batch of (network, request) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan
from autopar.ir.software import Software
from autopar.ir.solution import RECOMPUTE, Objective, Pins
from autopar.planner.execute import FLOAT64_TOLERANCE, verify_worker
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from tests.dist.generated import KINDS
from tests.dist.ranks import run_on

pytestmark = pytest.mark.dist
SOURCE = Path(__file__).parent / "generated.py"
NETWORKS_PER_LAUNCH = 10


@dataclass(frozen=True)
class Toy:
    """A network, a batch size, and what is asked of the planner."""

    layers: tuple[str, ...]
    batch: int
    gpu: str
    objective: Objective
    pins: Pins
    software: Software


def toys(num_processes: int) -> st.SearchStrategy[Toy]:
    layer = st.builds(lambda kind, residual: kind + "+" * residual, st.sampled_from(KINDS), st.booleans())
    objective = st.sampled_from(
        [Objective("time"), Objective("energy"), Objective("edp"), Objective("weighted", 1.0, 0.01)]
    )
    degrees = [(d, t, p) for d in (1, 2, 4) for t in (1, 2, 4) for p in (1, 2, 4) if d * t * p == num_processes]
    free = st.just(Pins())
    pinned = st.builds(
        lambda degree, m, zero, recompute, chunks: Pins(
            dp=degree[0],
            tp=degree[1],
            pp=degree[2],
            num_microbatches=m,
            zero=zero,
            recompute=recompute,
            interleave=chunks if degree[2] > 1 else None,
        ),
        st.sampled_from(degrees),
        st.sampled_from([None, 2]),
        st.sampled_from([None, 0, 1, 3]),
        st.sampled_from([None, *RECOMPUTE]),
        st.sampled_from([None, None, 2]),
    )
    return st.builds(
        Toy,
        st.lists(layer, min_size=1, max_size=6).map(tuple),
        st.sampled_from([8, 512]),
        st.sampled_from(["cpu", "h100-sxm-80gb"]),
        objective,
        st.one_of(pinned, pinned, free),
        st.builds(Software, overlap_gradients=st.booleans(), prefetch_parameters=st.booleans()),
    )


def emitted(toy: Toy, num_processes: int) -> Plan | None:
    """The planner's answer, or None where the pins leave nothing (e.g. more stages than blocks)."""
    request = PlanRequest(
        num_gpus=num_processes,
        gpu=toy.gpu,
        objective=toy.objective,
        pins=toy.pins,
        software=toy.software,
        use_all=True,
        batch_size=toy.batch,
    )
    try:
        return plan_model(str(SOURCE), {"layers": ",".join(toy.layers), "batch": str(toy.batch)}, request)
    except (InputError, InfeasibleError):
        return None


def verify_all(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One rank: every plan in turn."""
    return [verify_worker({**arguments, "plan": plan}) for plan in arguments["plans"]]


def check(made_up: list[Toy], num_processes: int) -> None:
    plans = [plan for toy in made_up if (plan := emitted(toy, num_processes)) is not None]
    assert len(plans) >= NETWORKS_PER_LAUNCH // 2
    arguments = {"plans": [dump_plan(p) for p in plans], "dtype": "float64", "tolerance": FLOAT64_TOLERANCE}
    found = run_on(num_processes, "tests.dist.test_emitted_plans:verify_all", arguments)
    for plan, report in zip(plans, found[0], strict=True):
        shown = (plan.model.options, plan.decisions.mesh.sizes, len(plan.decisions.stages), report)
        assert plan.solver.bound <= plan.solver.objective * (1 + 1e-12), shown
        assert report["loss_error"] <= FLOAT64_TOLERANCE, shown
        assert report["worst_gradient_error"] <= FLOAT64_TOLERANCE, shown


FEW_LAUNCHES = settings(
    max_examples=1,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
MORE_LAUNCHES = settings(FEW_LAUNCHES, max_examples=4)


def networks(num_processes: int) -> st.SearchStrategy[list[Toy]]:
    return st.lists(toys(num_processes), min_size=NETWORKS_PER_LAUNCH, max_size=NETWORKS_PER_LAUNCH, unique=True)


@FEW_LAUNCHES
@given(networks(2))
def test_on_two_processes(made_up: list[Toy]) -> None:
    check(made_up, 2)


@FEW_LAUNCHES
@given(networks(4))
def test_on_four_processes(made_up: list[Toy]) -> None:
    check(made_up, 4)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_more_of_them(num_processes: int) -> None:
    @MORE_LAUNCHES
    @given(networks(num_processes))
    def compare(made_up: list[Toy]) -> None:
        check(made_up, num_processes)

    compare()
