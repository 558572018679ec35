"""What energy plans save against the plan of least time, and what clocks per instruction alone save on that plan.

    python benchmarks/savings.py [MODEL...] [--gpus 8,64] [--quick] [--json] [--gpu NAME] [--fresh]

MODEL is one of those below. For each, and each ceiling on the number of GPUs, two plans of least energy are split by
`planner.savings`: one without a deadline, and one that must be as fast as the plan of least time. A line ends in what
the plan saves beyond clocks per instruction alone, which get the same time; `with clocks` adds clocks per instruction
to the plan itself. Nothing is measured: every figure is modelled. --fresh plans without the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.errors import InfeasibleError
from autopar.ir.plan import Plan
from autopar.ir.savings import Savings, SavingStep
from autopar.ir.serialize import parse_plan
from autopar.ir.solution import Limits, Objective
from autopar.planner.recall import Command, finished_plan
from autopar.planner.request import PlanRequest
from autopar.planner.savings import split_savings
from autopar.report.explain_savings import savings_json
from autopar.units import format_joules, format_seconds

ROOT = Path(__file__).resolve().parent.parent
SAME_TIME = 1e-6
"""Share by which the plan of the same time may be later: a step of exactly the least time is one plan alone."""

ROUNDING = 1e-6
"""Share of the fastest plan's energy by which two equal plans may differ."""


@dataclass(frozen=True)
class Case:
    """A model of the examples at one size; `batch` sequences a step."""

    name: str
    example: str
    options: dict[str, int] = field(default_factory=dict)


CASES = (
    Case("gpt2-xl", "gpt2", {"layers": 48, "hidden": 1600, "heads": 25, "batch": 512}),
    Case("llama-3-8b", "llama", {"batch": 128}),
    Case(
        "llama-3-70b", "llama", {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "batch": 128}
    ),
)
QUICK = Case("gpt2-medium", "gpt2", {"layers": 24, "hidden": 1024, "heads": 16, "batch": 128})


@dataclass(frozen=True)
class Row:
    """One plan's savings; `deadline` tells whether it had to be as fast as the fastest."""

    case: str
    num_gpus: int
    deadline: bool
    savings: Savings
    cpu_s: float

    @property
    def first_j(self) -> float:
        return energy_j(self.savings.fastest)

    @property
    def with_clocks_j(self) -> float:
        """Saved by the plan with a clock per instruction."""
        return self.first_j - energy_j(self.savings.beyond or self.savings.plan)

    @property
    def alone_j(self) -> float:
        """Saved by clocks per instruction on the fastest plan, in the plan's time."""
        return self.savings.alone[-1].saved_j if self.savings.alone else 0.0

    @property
    def is_behind(self) -> bool:
        """Clocks alone save more than the plan, clocks of its own included."""
        return self.with_clocks_j < self.alone_j - ROUNDING * self.first_j

    def share(self, joules: float) -> str:
        """Of the fastest plan's energy."""
        return f"{round(joules / self.first_j, 3) + 0.0:.1%}"

    def text(self) -> str:
        """One line."""
        found = self.savings
        parts = ", ".join(f"{step.cause} {self.share(step.saved_j)}" for step in found.steps)
        alone = [self.share(step.saved_j) for step in found.alone] or ["0.0%", "0.0%"]
        ahead = f"ahead by {self.share(found.saved_j - self.alone_j)}"
        return (
            f"{self.case:<12} up to {self.num_gpus:<3} {'as fast' if self.deadline else 'free':<8} "
            f"fastest {words(found.fastest)}; plan {words(found.plan)}: saves {self.share(found.saved_j)} ({parts}), "
            f"with clocks {self.share(self.with_clocks_j)}; clocks alone {alone[0]} in its time, {alone[1]} in the "
            f"plan's; cpu {self.cpu_s:.0f} s; {ahead}, with clocks by {self.share(self.with_clocks_j - self.alone_j)}"
        )

    def content(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "num_gpus": self.num_gpus,
            "deadline": self.deadline,
            "cpu_s": self.cpu_s,
            "ahead": (self.savings.saved_j - self.alone_j) / self.first_j,
            "ahead_with_clocks": (self.with_clocks_j - self.alone_j) / self.first_j,
            **savings_json(self.savings),
        }


def energy_j(step: SavingStep) -> float:
    """Of a step that has a plan."""
    if step.energy_j is None:
        raise ValueError(step.reason)
    return step.energy_j.value


def words(step: SavingStep) -> str:
    """`64 GPUs (dp=8 pp=8 m=8) 1.2 s 300 kJ`."""
    if step.step_time_s is None:
        raise ValueError(step.reason)
    figures = f"{format_seconds(step.step_time_s.value)} {format_joules(energy_j(step))}"
    return f"{step.num_gpus} GPUs ({step.description}) {figures}"


def measure(case: Case, gpu: str, num_gpus: int, use_cache: bool) -> Iterator[Row]:
    """The free plan, then the one that is as fast as the fastest."""
    options = {name: str(value) for name, value in case.options.items()}
    source = str(ROOT / "examples" / f"{case.example}.py")
    free = PlanRequest(num_gpus, gpu=gpu, objective=Objective("energy"), profile="none")

    def made(request: PlanRequest) -> Plan:
        return parse_plan(finished_plan(Command(source, options, request, use_cache)).plan_text)

    deadline_s: float | None = None
    for limited in (False, True):
        began = time.process_time()
        limits = Limits(deadline_s=deadline_s) if limited else Limits()
        plan = made(PlanRequest(num_gpus, gpu=gpu, objective=free.objective, profile="none", limits=limits))
        found = split_savings(plan, use_cache=use_cache)
        yield Row(case.name, num_gpus, limited, found, time.process_time() - began)
        if found.fastest.step_time_s is None:
            raise ValueError(found.fastest.reason)
        deadline_s = found.fastest.step_time_s.value * (1 + SAME_TIME)


def main() -> int:
    """Print the table; 1: clocks alone save more somewhere, even than the plan with clocks of its own."""
    parser = argparse.ArgumentParser(description="Savings of energy plans against clocks alone; all modelled.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(case.name for case in CASES))
    parser.add_argument("--gpus", default="64", help="ceilings, e.g. 8,64")
    parser.add_argument("--gpu", default="h100-sxm-80gb")
    parser.add_argument("--quick", action="store_true", help="one smaller model on up to 8 GPUs; under 50 s")
    parser.add_argument("--fresh", action="store_true", help="without the plan cache")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    known = {case.name: case for case in (*CASES, QUICK)}
    unknown = [name for name in options.models if name not in known]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; known: {', '.join(known)}")
    names = options.models or ([QUICK.name] if options.quick else [case.name for case in CASES])
    counts = [8] if options.quick else [int(text) for text in options.gpus.split(",")]
    rows: list[Row] = []
    for name in names:
        for count in counts:
            try:
                for row in measure(known[name], options.gpu, count, not options.fresh):
                    rows.append(row)
                    if not options.json:
                        print(row.text(), flush=True)
            except InfeasibleError as error:
                print(f"{name} on up to {count}: {str(error).splitlines()[0]}", file=sys.stderr)
    if options.json:
        print(json.dumps([row.content() for row in rows], indent=1))
    return int(any(row.is_behind for row in rows))


if __name__ == "__main__":
    sys.exit(main())
