"""Does parallel training save energy, and where does it stop paying? Three programs, serial and parallel.

    python examples/energy_study.py [--quick] [--workers 1,2,4,8] [--json] [--plot study.svg]

The question is that of published studies of parallel efficiency in time and energy (K-means, ant colonies, logistic
regression and random search on many cores; networks trained by SGD): a logistic regression, an evolutionary search and
a network trained by SGD, serial against workers that are kept in step by all-reduce, by a synchronous and an
asynchronous parameter server, and by averaging every 8 steps. All data are synthetic and come from a seed. Every
policy does equal work per step: the samples, or the population, are shared out over the workers.

As many workers as there are cores are run for real. Energy is read from RAPL where that is possible, else modelled
from the powers of the device file `cpu` at the time measured; labels say which. Predictions go further: computing is
measured here at each worker's share, exchanging is priced by the cost model (with `--profile`, from measured links).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autopar.cli.sweep import parse_counts
from autopar.cost.hardware import Cluster
from autopar.cost.sync import Exchanged, price_sync, work_of
from autopar.ir.study import Study, StudyCase, is_alone
from autopar.ir.sync import parse_policy
from autopar.planner.request import PlanRequest, choose_target
from autopar.planner.study import Running, run_cases, run_policies
from autopar.planner.sweep import CPU, busy_note, num_cores
from autopar.report.study import PRICED, RUN, plot_study, study_json, study_report
from autopar.runtime.sync.replica import ModuleTask, Task

POLICIES = tuple(parse_policy(text) for text in ("all-reduce", "ps-sync", "ps-async", "local=8"))
SAMPLES, INPUTS, CLASSES, WIDTH = 8192, 128, 10, 256
POPULATION, SIGMA = 64, 0.1
RATES = {"logistic regression": 0.5, "evolutionary search": 0.2, "network by SGD": 0.1}
REPEATS = 5


def samples(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, INPUTS, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return centres[labels] + 3.0 * torch.randn(SAMPLES, INPUTS, generator=generator), labels


class WithLoss(nn.Module):
    """A classifier whose result is its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.model(x), labels)


def classifier(make: Callable[[], nn.Module], worker: int, num_workers: int) -> Task:
    """Trains on every num_workers-th sample."""
    torch.manual_seed(0)
    x, labels = samples(1)
    part = [x[worker::num_workers].contiguous(), labels[worker::num_workers].contiguous()]
    return ModuleTask(WithLoss(make()), lambda _step: (part, {}))


def logistic_regression(worker: int, num_workers: int) -> Task:
    return classifier(lambda: nn.Linear(INPUTS, CLASSES), worker, num_workers)


def network(worker: int, num_workers: int) -> Task:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
        )

    return classifier(make, worker, num_workers)


class Evolution:
    """Evolution strategy with mirrored samples (Salimans et al. 2017): needs values of the loss, no derivatives.

    A worker tries its share of the population; what it adds up is an estimate of the gradient.
    """

    def __init__(self, worker: int, num_workers: int) -> None:
        self.parameters = [torch.zeros(CLASSES, INPUTS), torch.zeros(CLASSES)]
        x, labels = samples(1)
        self.x, self.labels = x[:1024], labels[:1024]
        self.pairs = range(worker, POPULATION // 2, num_workers)

    def loss(self, shift: Sequence[torch.Tensor], sign: float) -> float:
        weight, bias = (p + sign * SIGMA * s for p, s in zip(self.parameters, shift, strict=True))
        return float(functional.cross_entropy(functional.linear(self.x, weight, bias), self.labels))

    def gradient(self, step: int) -> float:
        total = 0.0
        for pair in self.pairs:
            generator = torch.Generator().manual_seed(POPULATION * step + pair)
            shift = [torch.randn(p.shape, generator=generator) for p in self.parameters]
            above, below = self.loss(shift, 1.0), self.loss(shift, -1.0)
            total += (above + below) / 2
            for parameter, own in zip(self.parameters, shift, strict=True):
                assert parameter.grad is not None
                parameter.grad += (above - below) / (2 * SIGMA * len(self.pairs)) * own
        return total / len(self.pairs)


TASKS: Mapping[str, Callable[[int, int], Task]] = {
    "logistic regression": logistic_regression,
    "evolutionary search": Evolution,
    "network by SGD": network,
}
UNITS = {"evolutionary search": POPULATION // 2}
"""What is shared out, where that is not the samples: pairs of the population."""


def worker(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One process of the study."""
    torch.set_num_threads(1)
    return run_policies(arguments, TASKS)


def compute_s(make_task: Callable[[int, int], Task], num_workers: int) -> float:
    """Processor seconds of a worker's step, measured alone in this process: the least of a few."""
    task = make_task(0, num_workers)
    for parameter in task.parameters:
        parameter.grad = torch.zeros_like(parameter)
    seconds = []
    for step in range(REPEATS + 1):
        began = time.process_time()
        task.gradient(step)
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def priced(name: str, cluster: Cluster, counts: Sequence[int]) -> list[StudyCase]:
    """Every policy on every number of workers that the work can be shared out to."""
    make_task, cases = TASKS[name], []
    shapes = [tuple(parameter.shape) for parameter in make_task(0, 1).parameters]
    what, units = Exchanged(shapes, 4), UNITS.get(name, SAMPLES)
    for count in counts:
        reason = f"{units} do not divide over {count} workers" if units % count else ""
        work = None if reason else work_of(cluster, compute_s(make_task, count))
        for policy in POLICIES:
            price = None if work is None else price_sync(cluster, policy, what, work, count)
            cases.append(StudyCase(policy, count, price, reason=reason))
    return cases


def run_study(counts: Sequence[int], steps: int, profile: str | None, *, say: Callable[[str], None]) -> list[Study]:
    """One study per program."""
    torch.set_num_threads(1)
    busy = busy_note()
    most = max(counts) + 1
    target = choose_target(PlanRequest(num_gpus=most, gpu=CPU, clocks="max", profile=profile))
    assert isinstance(target.cluster, Cluster)
    cases = {}
    for name in TASKS:
        say(f"measuring a worker's share of {name}")
        cases[name] = priced(name, target.cluster, counts)
    running = Running(num_cores(), steps, rates=RATES)
    found = run_cases(cases, f"energy_study:{worker.__name__}", running, progress=say)
    notes: tuple[str, ...] = ("predictions: computing measured here, exchanging and powers from the cost model of cpu",)
    notes += tuple(note for note in (target.profile.note, busy) if note)
    return [Study(f"{name} on {CPU}", CPU, UNITS.get(name, SAMPLES), tuple(own), notes) for name, own in found.items()]


def summary(studies: Sequence[Study]) -> str:
    """One line per program: where its energy is least, as predicted and as run."""
    lines = ["Least energy per step, over all policies (E/E1: against serial)"]
    for study in studies:
        for words, figures in (("predicted", PRICED), ("run here", RUN)):
            known = [(found[1], case) for case in study.cases if (found := figures(case)) is not None]
            if not known:
                continue
            joules, best = min(known, key=lambda entry: entry[0])
            against = study.against_serial(best, figures)
            ratio = "" if against is None else f", x {against[0]:.2f}, E/E1 {against[1]:.2f}"
            who = (
                "serial" if is_alone(best) else f"{best.policy} on {best.num_workers} of {best.num_processes} processes"
            )
            lines.append(f"  {study.title}, {words}: {who}, {joules:.3g} J{ratio}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4,8,16,32", help="numbers of workers; default 1,2,4,8,16,32")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each run")
    parser.add_argument("--quick", action="store_true", help="10 steps: under a minute on two idle cores")
    parser.add_argument("--profile", metavar="FILE", help="measured rows of device cpu; 'none': no rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="one picture per program, with its name before the suffix")
    arguments = parser.parse_args()
    counts = parse_counts(arguments.workers, "--workers")
    studies = run_study(
        counts,
        10 if arguments.quick else arguments.steps,
        arguments.profile,
        say=lambda phrase: print(phrase, file=sys.stderr, flush=True),
    )
    if arguments.plot:
        path = Path(arguments.plot)
        for study in studies:
            plot_study(study, path.with_stem(f"{path.stem}_{study.title.split()[0]}"))
    if arguments.json:
        print(json.dumps([study_json(study) for study in studies], indent=1))
    else:
        print("\n\n".join([*map(study_report, studies), summary(studies)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
