"""Iterations priced from a device file alone, under any power limit and clock; see `energy.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fit_steps import golden

from autopar.cost.hardware import Cluster, with_power_limit
from autopar.cost.predict import plan_costs, predict, transfers_s
from autopar.cost.table import CostTables
from autopar.ir.solution import Decisions, Pins
from autopar.planner.estimate import price_configuration
from autopar.planner.plan import capture_graph
from autopar.planner.request import PlanRequest
from autopar.planner.software import chosen_software
from autopar.search.clocks import ClockOption

FITTED = {
    "tf32_efficiency": (0.3, 0.9),
    "convolution_efficiency": (0.3, 0.9),
    "memory_share": (0.2, 1.0),
    "gemm_share": (0.85, 1.0),
    "sustained_share": (0.78, 1.0),
}
"""Numbers of a device file, and bounds that keep them physical."""
Options = Mapping[tuple[int, str], tuple[ClockOption, ...]]


@dataclass(frozen=True)
class BuiltIn:
    """A model with its plan: `stages` stages of `width` GPUs."""

    tables: CostTables
    decisions: Decisions

    def at(self, limit_w: float) -> CostTables:
        return self.tables.on(with_power_limit(self.tables.cluster, limit_w))

    def uniform_j(self, limit_w: float) -> float:
        """Joules of the GPUs."""
        return _gpus_j(self.at(limit_w), self.decisions)

    def time_s(self, limit_w: float) -> float:
        return predict(self.at(limit_w), self.decisions).step_time_s.value

    @cached_property
    def step_j(self) -> float:
        """Joules of the update."""
        costs, _ = plan_costs(self.tables, self.decisions)
        blocked_w = self.tables.cluster.spec.blocked_w * self.decisions.mesh.num_devices
        return sum(self.decisions.mesh.num_devices * c.step_j for c in costs) + blocked_w * len(costs) * max(
            c.step_s for c in costs
        )

    @cached_property
    def transfer_s(self) -> float:
        """Of the slowest link between stages."""
        costs, _ = plan_costs(self.tables, self.decisions)
        return max(transfers_s(self.tables, costs, self.decisions))

    def _options(self, tables: CostTables, clock_hz: float, stage: int) -> tuple[ClockOption, ClockOption]:
        """Forward and backward of one stage; a microbatch's dynamic energy goes with the time of each."""
        stages = tuple(replace(one, clock_hz=clock_hz) for one in self.decisions.stages)
        cost = plan_costs(tables, replace(self.decisions, stages=stages))[0][stage]
        spec = tables.cluster.spec
        power_w = spec.blocked_w + cost.microbatch_j / (cost.forward_s + cost.backward_s)
        mhz = (clock_hz or spec.clock_max_hz) / 1e6
        forward, backward = (ClockOption(mhz, t, power_w * t) for t in (cost.forward_s, cost.backward_s))
        return forward, backward

    def limited(self, limits_w: Sequence[float]) -> Options:
        """The one option of every stage under its own limit."""
        found = {}
        for stage, limit_w in enumerate(limits_w):
            for kind, option in zip("FB", self._options(self.at(limit_w), 0.0, stage), strict=True):
                found[stage, kind] = (option,)
        return found

    @cached_property
    def clocked(self) -> Options:
        """Every stage at every clock."""
        clocks = self.tables.clocks_hz
        found: dict[tuple[int, str], list[ClockOption]] = {}
        for clock_hz in (0.0, *clocks[1:]):
            for stage in range(len(self.decisions.stages)):
                for kind, option in zip("FB", self._options(self.tables, clock_hz, stage), strict=True):
                    found.setdefault((stage, kind), []).append(option)
        return {key: tuple(options) for key, options in found.items()}


def price_pipeline(
    model: tuple[str, Mapping[str, str], int], cluster: Cluster, *, stages: int, width: int, microbatches: int
) -> BuiltIn:
    """The pipeline that `autopar estimate` plans; activations are recomputed, float32 products run in tf32.

    Args:
        model: source, options and batch.

    Raises:
        AutoparError: it cannot be priced.
    """
    source, options, batch = model
    software = chosen_software("torch", {"tf32": True})
    captured = capture_graph(source, options, batch)
    pins = Pins(
        dp=1, tp=width, pp=stages, num_microbatches=microbatches, recompute="full", schedule="1f1b", zero=0,
        interleave=1,
    )  # fmt: skip
    request = PlanRequest(
        num_gpus=stages * width, gpu=cluster.gpu, gpus_per_node=cluster.gpus_per_node, pins=pins, profile="none",
        batch_size=batch, use_all=True, with_baselines=False, clocks="max", software=software,
    )  # fmt: skip
    planned = price_configuration(source, options, request, captured=captured).planned
    return BuiltIn(CostTables(captured.graph, cluster, pins=pins, software=software), planned.plan.decisions)


def _gpus_j(tables: CostTables, decisions: Decisions) -> float:
    predicted = predict(tables, decisions)
    return predicted.energy_j.value - predicted.energy_by_cause["host"]


def fit_numbers(
    rows: Sequence[tuple[BuiltIn, float, float, float]], rounds: int = 2
) -> tuple[float, float, dict[str, float]]:
    """Mean log error of time and energy before and after, and the numbers; rows: plan, limit, seconds, joules."""
    numbers = {name: float(getattr(rows[0][0].tables.cluster.spec, name)) for name in FITTED}

    def error(changed: Mapping[str, float]) -> float:
        errors = []
        for built, limit_w, time_s, energy_j in rows:
            limited = with_power_limit(built.tables.cluster, limit_w)
            tables = built.tables.on(replace(limited, spec=replace(limited.spec, **changed)))
            predicted = predict(tables, built.decisions)
            own_j = predicted.energy_j.value - predicted.energy_by_cause["host"]
            errors += [abs(math.log(predicted.step_time_s.value / time_s)), abs(math.log(own_j / energy_j))]
        return statistics.fmean(errors)

    before = error({})
    for _ in range(rounds):
        for name, (low, high) in FITTED.items():
            found = golden(lambda value, name=name: error({**numbers, name: value}), low, high)  # type: ignore[misc]
            if error({**numbers, name: found}) < error(numbers):
                numbers[name] = found
    return before, error(numbers), numbers
