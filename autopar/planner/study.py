"""Studies of policies that keep replicas in step: priced with the cost model, and run on local gloo processes.

A worker's computation is the plan of its samples on one device, left at its highest clock: in one microbatch without
recompute, as the runtime does, or in the best other way where that does not fit into its memory. Prices add what a
policy exchanges (`cost.sync`). Runs build the model with seed 0 everywhere, cut the example batch evenly over the
workers and train on it with SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autopar.cost.hardware import Cluster
from autopar.cost.sync import Exchanged, Work, apply_cost, price_sync
from autopar.errors import InfeasibleError, InputError
from autopar.ir.graph import OpGraph
from autopar.ir.plan import ModelReference
from autopar.ir.quantity import Quantity
from autopar.ir.solution import Pins
from autopar.ir.study import Study, StudyCase
from autopar.ir.sync import SyncPolicy, SyncRun, parse_policy
from autopar.ir.tensor import BYTES_BY_DTYPE
from autopar.planner.execute import SEED
from autopar.planner.plan import capture_graph, plan_graph
from autopar.planner.request import PlanRequest, Progress, Target, choose_target, say_nothing
from autopar.planner.sweep import busy_note, hidden_gpus

if TYPE_CHECKING:
    from autopar.runtime.sync.replica import Task
    from autopar.runtime.sync.train import MakeTask, Trained

OPTIMIZER = "sgd"


@dataclass(frozen=True)
class Running:
    """How to run what is studied.

    Attributes:
        most_workers: cases of more are not run; a server, which mostly waits, comes on top.
        steps: timed ones.
        rate: of SGD.
        rates: of models whose name is among these.
    """

    most_workers: int
    steps: int = 20
    rate: float = 0.1
    rates: Mapping[str, float] = field(default_factory=dict)


def study_model(
    source: str,
    options: Mapping[str, str],
    request: PlanRequest,
    policies: Sequence[SyncPolicy],
    workers: Sequence[int],
    *,
    running: Running | None = None,
    progress: Progress | None = None,
) -> Study:
    """Price every policy on every number of workers; with `running`, also run those that fit.

    Args:
        request: device, batch and profile; its number of GPUs does not count.

    Raises:
        InputError, CaptureError: the model or a number is wrong.
    """
    progress, busy = progress or say_nothing, busy_note() if running is not None else ""
    if request.cluster is not None:
        raise InputError("a study is of one type of device: name it with --gpu")
    most = max(policy.num_processes(count) for policy in policies for count in workers)
    target = choose_target(replace(request, num_gpus=most, clocks="max"))
    graph = capture_graph(source, options, request.batch_size, progress).graph
    whole, cases = graph.batch_size, []
    for count in sorted(set(workers)):
        if whole % count:
            reason = f"a batch of {whole} does not divide over {count} workers"
            cases += [StudyCase(policy, count, reason=reason) for policy in policies]
            continue
        progress(f"pricing {count} workers")
        part = graph if count == 1 else capture_graph(source, options, whole // count, progress).graph
        cases += _priced(part, request, target, policies, count)
    if running is not None:
        model = {"source": source, "options": dict(options), "batch_size": whole}
        entry = f"{__name__}:{model_worker.__name__}"
        cases = run_cases({source: cases}, entry, running, arguments=model, progress=progress)[source]
    return Study(
        f"{source} on {target.choice.name}", target.choice.name, whole, tuple(cases), _notes(target, running, busy)
    )


def _notes(target: Target, running: Running | None, busy: str) -> tuple[str, ...]:
    notes = [note for note in (target.choice.note, target.profile.note) if note]
    notes.append(f"priced with the optimizer {OPTIMIZER}, one message per exchange, nothing overlapped, coding free")
    if running is not None:
        notes += ["every step that was run trains on the example batch", *([busy] if busy else [])]
    return tuple(notes)


def _priced(
    graph: OpGraph, request: PlanRequest, target: Target, policies: Sequence[SyncPolicy], count: int
) -> list[StudyCase]:
    """Cases of one number of workers; `graph` is of one worker's samples."""
    cluster = target.cluster
    if not isinstance(cluster, Cluster):
        raise AssertionError("a request without groups means one type of device")
    try:
        what = exchanged_of(graph)
        work = _work(graph, request, what)
    except (InfeasibleError, InputError) as error:
        reason = str(error).splitlines()[0]
        return [StudyCase(policy, count, reason=reason) for policy in policies]
    return [StudyCase(policy, count, price_sync(cluster, policy, what, work, count)) for policy in policies]


def exchanged_of(graph: OpGraph) -> Exchanged:
    """The trained parameters of a graph as one message. Raises InputError where they are of several dtypes."""
    trained = [value.meta for value in graph.parameters if value.requires_grad]
    kinds = {meta.dtype for meta in trained}
    if len(kinds) != 1:
        found = ", ".join(sorted(kinds)) or "no trained parameters"
        raise InputError(f"parameters must be of one dtype to be exchanged as one vector, found {found}")
    return Exchanged([meta.shape for meta in trained], BYTES_BY_DTYPE[kinds.pop()], OPTIMIZER)


def _work(graph: OpGraph, request: PlanRequest, what: Exchanged) -> Work:
    """Forward and backward of one worker, from the plan on one device. Raises InfeasibleError where there is none."""
    pins = Pins(dp=1, tp=1, pp=1, num_microbatches=1, recompute="none")
    alone = replace(request, num_gpus=1, pins=pins, clocks="max", with_baselines=False, batch_size=None)
    try:
        return _work_of(graph, alone, what)
    except InfeasibleError:
        return _work_of(graph, replace(alone, pins=Pins(dp=1, tp=1, pp=1)), what)


def _work_of(graph: OpGraph, request: PlanRequest, what: Exchanged) -> Work:
    target = choose_target(request)
    if not isinstance(target.cluster, Cluster):
        raise AssertionError("a request without groups means one type of device")
    own = replace(graph, optimizer=OPTIMIZER)
    predicted = plan_graph(own, ModelReference("<study>", {}, "", 0), request, target).predicted
    (stage,) = predicted.stages
    _, apply_j = apply_cost(target.cluster, what)
    dynamic_j = predicted.energy_by_cause["dynamic"]
    return Work(predicted.step_time_s.value - stage.step_s.value, max(0.0, dynamic_j - apply_j))


def run_cases(
    cases: Mapping[str, Sequence[StudyCase]],
    entry: str,
    running: Running,
    *,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress = say_nothing,
) -> dict[str, list[StudyCase]]:
    """The cases with what running them measured: one launch per number of processes, cases one after another.

    Args:
        cases: by the name of what is trained.
        entry: worker function that calls `run_policies`; it is given `arguments`, and what that reads.
    """
    from autopar.runtime.launch import Job, launch_local

    found = {name: [_refused(case, running) for case in own] for name, own in cases.items()}
    by_count: dict[int, list[tuple[str, int]]] = {}
    for name, own in found.items():
        for place, case in enumerate(own):
            if not case.reason and not case.not_run:
                by_count.setdefault(case.num_processes, []).append((name, place))
    for count, places in sorted(by_count.items()):
        progress(f"running {len(places)} trainings on {count} processes")
        runs = [(name, str(found[name][i].policy), running.rates.get(name, running.rate)) for name, i in places]
        asked = {**(arguments or {}), "runs": runs, "steps": running.steps}
        with hidden_gpus():
            results = launch_local(Job(entry, asked, count))[0]
        for (name, place), fields in zip(places, results, strict=True):
            found[name][place] = replace(found[name][place], run=_run_of(fields))
    return found


def _refused(case: StudyCase, running: Running) -> StudyCase:
    if case.reason or case.num_workers <= running.most_workers:
        return case
    return replace(case, not_run=f"more than the {running.most_workers} to be run here")


def run_policies(arguments: Mapping[str, Any], tasks: Mapping[str, MakeTask]) -> list[dict[str, Any]]:
    """One process of `run_cases`: the trainings asked for, one after another, and what was measured of each."""
    from autopar.runtime.sync.train import TrainOptions, train

    steps = int(arguments["steps"])
    return [
        _fields(train(tasks[name], parse_policy(text), TrainOptions(steps=steps, rate=float(rate))))
        for name, text, rate in arguments["runs"]
    ]


def _fields(trained: Trained) -> dict[str, Any]:
    run = trained.run
    return {
        "policy": str(run.policy),
        "num_workers": run.num_workers,
        "step_time": _quantity_fields(run.step_time),
        "energy": None if run.energy is None else _quantity_fields(run.energy),
        "losses": list(run.losses),
        "staleness": sorted(run.staleness.items()),
        "notes": list(run.notes),
    }


def _quantity_fields(quantity: Quantity) -> dict[str, Any]:
    return {name: getattr(quantity, name) for name in ("value", "unit", "label", "low", "high")}


def _run_of(fields: Mapping[str, Any]) -> SyncRun:
    energy = fields["energy"]
    return SyncRun(
        parse_policy(fields["policy"]),
        fields["num_workers"],
        Quantity(**fields["step_time"]),
        None if energy is None else Quantity(**energy),
        tuple(fields["losses"]),
        {int(late): int(count) for late, count in fields["staleness"]},
        tuple(fields["notes"]),
    )


def model_worker(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One process of `study_model`."""
    from autopar.capture.source import load_source

    source = load_source(arguments["source"], arguments["options"])

    def make_task(worker: int, num_workers: int) -> Task:
        from autopar.planner.materialise import part_of_batch, seeded_module
        from autopar.runtime.sync.replica import ModuleTask

        batch = part_of_batch(source, arguments["batch_size"], worker, num_workers)
        return ModuleTask(seeded_module(source, SEED), lambda _step: batch)

    return run_policies(arguments, {arguments["source"]: make_task})
