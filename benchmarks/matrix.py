"""Random plans from all that the search may choose, for every example model, compared with the serial model.

    python benchmarks/matrix.py [--quick] [--json] [--pairs 80] [--processes 2,4] [--models gpt2,t5] [--seed 0]

Pairs of a model and a plan are drawn by hypothesis (`matrix_draw.py`) until there are `--pairs` for each number of
processes and every feature of the space (`matrix_space.py`) is in some of them. Each plan is priced, written as
plan.json, read back and run for one step in float64 on gloo processes that many plans share; a line ends in the largest
relative error of loss, gradients, updated buffers and parameters after an SGD step. Then come the features drawn, with
how many pairs that passed have them, and those that are in the space but were not drawn. Exit code 4: an error above
1e-10, or a feature not drawn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.planner.execute import FLOAT64_TOLERANCE
from autopar.runtime.launch import Job, launch_local
from benchmarks.matrix_draw import Pair, draw_pair
from benchmarks.matrix_space import Subject
from benchmarks.verify_matrix import MODELS

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    **{name: (name, options) for name, options in MODELS.items()},
    "gpt2 dropout": ("gpt2", {**MODELS["gpt2"], "layers": "2", "dropout": "0.2"}),
}
"""Example and options of every model of the matrix."""
PAIRS_PER_LAUNCH = 100
PATIENCE = 300
"""Draws in a row without anything new after which the rest counts as not drawn."""
LEARNING_RATE = 1.0


@dataclass(frozen=True)
class Verdict:
    """What came of one pair: the largest errors by kind, or what went wrong."""

    pair: Pair
    processes: int
    errors: Mapping[str, float]
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and all(error <= FLOAT64_TOLERANCE for error in self.errors.values())

    def __str__(self) -> str:
        decisions = self.pair.decisions
        mesh = "x".join(map(str, decisions.mesh.sizes))
        runs = f"interleaved {decisions.interleave}" if decisions.interleave > 1 else decisions.schedule
        policies = "+".join(sorted({stage.recompute for stage in decisions.stages}))
        layout = f"pp={decisions.num_ranks} mesh={mesh} m={decisions.num_microbatches} {runs} recompute={policies}"
        worst = max(self.errors, key=lambda kind: self.errors[kind], default="")
        figure = self.failure or f"{worst} {self.errors[worst]:.1e}"
        return f"{self.pair.subject.name:12} {self.processes} {layout:60} {'ok' if self.passed else 'FAIL'} {figure}"


def subjects(names: Iterable[str]) -> list[Subject]:
    """The models of these names, by paths as seen from here."""
    found = ((name, *SUBJECTS[name]) for name in names)
    return [Subject(name, os.path.relpath(ROOT / "examples" / f"{file}.py"), options) for name, file, options in found]


def draw_pairs(models: Sequence[Subject], processes: int, count: int, seed: int = 0) -> tuple[list[Pair], set[str]]:
    """At least `count` different pairs, one model after the other, and what of the space none of them has.

    What none has yet is looked for; once there are enough pairs, only pairs that bring something are added.
    """
    missing = {feature for model in models for feature in model.features(processes)}
    drawn: list[Pair] = []
    idle = 0
    for number in itertools.count():
        is_enough = len(drawn) >= count
        if (is_enough and not missing) or idle >= PATIENCE:
            break
        lacking = [model for model in models if missing & model.features(processes)] if is_enough else models
        model = lacking[number % len(lacking)]
        wanted = frozenset(missing & model.features(processes))
        half = (models.index(model) + processes // 2) % 2
        pair = draw_pair(model, processes, wanted, number=seed * 10**6 + number, half=half)
        idle = 0 if wanted & pair.features else idle + is_enough
        if wanted & pair.features or not (is_enough or pair in drawn):
            drawn.append(pair)
            missing -= pair.features
    return drawn, missing


def verify_pairs(pairs: Sequence[Pair], processes: int, tell: Callable[[Verdict], None]) -> list[Verdict]:
    """Run every pair; one that ends its processes is a failure, and the others go on in new ones."""
    waiting = sorted(pairs, key=lambda pair: (pair.subject.name, pair.decisions.num_microbatches))
    verdicts: list[Verdict] = []

    def add(pair: Pair, errors: Mapping[str, float], failure: str = "") -> None:
        verdicts.append(Verdict(pair, processes, errors, failure))
        tell(verdicts[-1])

    while waiting:
        now: list[tuple[Pair, str]] = []
        while waiting and len(now) < PAIRS_PER_LAUNCH:
            pair = waiting.pop(0)
            try:
                now.append((pair, dump_plan(pair.plan())))
            except (AutoparError, AssertionError, ValueError) as error:
                add(pair, {}, f"no plan: {error}")
        left = [pair for pair, _ in now]

        def take(line: str, left: list[Pair] = left) -> None:
            if line.startswith("{"):
                add(left.pop(0), json.loads(line))

        job = Job("benchmarks.matrix:worker", {"plans": [text for _, text in now]}, processes)
        try:
            launch_local(job, timeout_s=120 + 30 * len(now), on_line=take)
        except AutoparError as error:
            if not left:
                raise
            add(left.pop(0), {}, str(error))
        waiting = left + waiting
    return verdicts


def worker(arguments: Mapping[str, Any]) -> None:
    """One rank: every plan in turn; rank 0 prints its errors. Serial steps and process groups are made once."""
    from autopar.planner.execute import Reference, make_reference
    from autopar.runtime.mesh import RankMesh

    key, reference = None, None
    meshes: dict[object, RankMesh] = {}
    for text in arguments["plans"]:
        plan = parse_plan(text)
        found = (plan.model, plan.decisions.num_microbatches)
        if found != key:
            key, reference = found, make_reference(plan, "float64", "cpu")
        assert isinstance(reference, Reference)
        errors = _errors(plan, reference, meshes)
        if os.environ["RANK"] == "0":
            print(json.dumps(errors), flush=True)


def _errors(plan: Plan, reference: Any, meshes: dict[object, Any]) -> dict[str, float]:
    """Largest relative error by kind over all ranks."""
    import torch
    import torch.distributed as dist

    from autopar.planner.assemble import make_executor
    from autopar.planner.execute import compare_with, run_options
    from autopar.runtime.compare import relative_error, smallest_scale
    from autopar.runtime.executor import OptimizerOptions, join_plan

    decisions, serial = plan.decisions, reference.serial
    where = (plan.model.graph_hash, decisions.mesh, decisions.stages, decisions.interleave)
    if where not in meshes:
        meshes[where] = join_plan(reference.graph, decisions, "cpu")
    descent = OptimizerOptions("sgd", learning_rate=LEARNING_RATE, weight_decay=0.0)
    options = replace(run_options(plan, "cpu"), optimizer=descent)
    executor = make_executor(reference.graph, decisions, reference.state, meshes[where], options)
    report = compare_with(reference, executor)
    executor.update()
    executor.sync_buffers()
    buffers = [relative_error(executor.buffers[n], serial.buffers[n]) for n in executor.updated_buffers]
    gradients = {name: serial.store.whole_gradient(name) for name in serial.store.items}
    floor = smallest_scale(gradients.values())
    updated = []
    for name in executor.store.items:
        start, gradient = reference.state[name], gradients[name]
        expected = start if gradient is None else start - LEARNING_RATE * gradient
        updated.append(relative_error(executor.store.whole_parameter(name).detach(), expected, floor))
    own = torch.tensor([max(buffers, default=0.0), max(updated, default=0.0)], dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return {
        "loss": report["loss_error"],
        "gradient": report["worst_gradient_error"],
        "buffer": float(own[0]),
        "parameter": float(own[1]),
    }


def show_ledger(counts: Mapping[str, int], missing: Mapping[int, Iterable[str]]) -> None:
    """Features drawn, by what they are about, and those that were not."""
    groups: dict[str, list[str]] = {}
    for feature, count in sorted(counts.items()):
        before, by, after = feature.partition(" by ")
        head, rest = (before, after) if by else feature.split(" ", 1) if " " in feature else (feature, "")
        groups.setdefault(head, []).append(f"{rest} {count}".strip())
    print("drawn, with the number of pairs that passed:")
    for head, entries in groups.items():
        print(f"  {head}: {', '.join(entries)}")
    for processes, features in missing.items():
        print(f"in the space on {processes} processes but not drawn: {', '.join(sorted(features)) or 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten pairs of two models on two processes")
    parser.add_argument("--json", action="store_true", help="print one object at the end")
    parser.add_argument("--pairs", type=int, default=80, help="for each number of processes, at least")
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--models", default=",".join(SUBJECTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failed", type=Path, help="directory for the plans that fail, for autopar verify")
    arguments = parser.parse_args()
    models = subjects(["mlp", "gpt2"] if arguments.quick else arguments.models.split(","))
    numbers = [2] if arguments.quick else [int(n) for n in arguments.processes.split(",")]
    verdicts: list[Verdict] = []
    missing: dict[int, set[str]] = {}
    started = time.perf_counter()
    for processes in numbers:
        pairs, _ = draw_pairs(models, processes, 10 if arguments.quick else arguments.pairs, arguments.seed)
        pairs = pairs[:10] if arguments.quick else pairs
        found = verify_pairs(pairs, processes, lambda verdict: None if arguments.json else print(verdict, flush=True))
        space = {feature for model in models for feature in model.features(processes)}
        missing[processes] = space.difference(*(v.pair.features for v in found if v.passed))
        verdicts += found
    passed = [verdict for verdict in verdicts if verdict.passed]
    counts = Counter(feature for verdict in passed for feature in verdict.pair.features)
    _save([verdict for verdict in verdicts if not verdict.passed], arguments.failed)
    if arguments.json:
        rows = [{"case": str(v), "passed": v.passed, "errors": v.errors} for v in verdicts]
        print(json.dumps({"pairs": rows, "drawn": counts, "not_drawn": {k: sorted(v) for k, v in missing.items()}}))
    else:
        show_ledger(counts, missing)
        print(f"{len(passed)} of {len(verdicts)} pairs pass; wall {time.perf_counter() - started:.0f} s")
    is_whole = arguments.quick or not any(missing.values())
    return 0 if len(passed) == len(verdicts) and is_whole else 4


def _save(verdicts: Iterable[Verdict], directory: Path | None) -> None:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for number, verdict in enumerate(verdicts):
            (directory / f"{number}.json").write_text(dump_plan(verdict.pair.plan()))


if __name__ == "__main__":
    sys.exit(main())
