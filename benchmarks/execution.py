"""Step time and peak memory of autopar's programs over the same step written by hand in plain torch.

    python benchmarks/execution.py [CASE...] [--quick] [--json] [--seconds S]

Two gloo processes of one thread each (one for a single device) hold both programs of a case; the counterparts are in
`handwritten.py`. First come three steps of each in float64, whose losses must agree, then the peak memory of each in
float32, then pairs of steps, in turn autopar's and the other's first. The figure is the median over pairs of the ratio
of their times.

A pair counts in `wall` if the processes hardly waited for a core meanwhile (the scheduler's own count). On a busy
machine few pairs are that lucky. `CPU` is the ratio of the CPU seconds of all threads of both processes, gloo's
included, over all pairs: it misses what a process waits for the other, but not the work that the step costs. A case
ends in `wall` where enough pairs were calm, else in `CPU`, and says which.

Memory is what torch's allocator had handed out at the worst moment of two steps, building included, to the byte. Beside
it stands the growth of resident memory, the lesser of two turns, which also depends on what ran before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cpu_truth import CALM, ROOT, _status_bytes, _waited_s

from autopar.errors import VerifyError
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.solution import Pins
from autopar.planner.plan import capture_graph, make_plan
from autopar.planner.request import PlanRequest
from autopar.runtime.launch import Job, launch_local

PROCESSES = 2
LEAST_CALM = 7
"""Calm pairs from which on a wall figure is given."""
SAMPLE_S = 0.1
"""Steps that are shorter are timed several together."""
LOSS_TOLERANCE = 1e-6
"""Relative, of losses in float64 after up to two updates."""
MEMORY_LIMIT = 1.05


@dataclass(frozen=True)
class Case:
    """One configuration of one model.

    Attributes:
        program: in `handwritten.PROGRAMS`.
        limit: largest step time that holds, in terms of the counterpart's.
    """

    model: str
    options: Mapping[str, str]
    program: str
    limit: float
    num_microbatches: int = 1

    @property
    def num_processes(self) -> int:
        return 1 if self.program == "single" else PROCESSES

    @property
    def pins(self) -> Pins:
        sizes = {"dp": 1, "tp": 1, "pp": 1}
        axis = {"data": "dp", "zero3": "dp", "tensor": "tp", "pipeline": "pp"}.get(self.program)
        if axis is not None:
            sizes[axis] = PROCESSES
        zero = {"data": 0, "zero3": 3}.get(self.program)
        if self.program == "tensor":
            return Pins(**sizes, num_microbatches=1, recompute="none", sequence=False)
        if self.program == "pipeline":
            count = self.num_microbatches
            return Pins(**sizes, num_microbatches=count, recompute="none", schedule="1f1b", interleave=1, zero=0)
        return Pins(**sizes, zero=zero, num_microbatches=1, recompute="none")


GPT, RESNET = "benchmarks/models/gpt.py", "benchmarks/models/wide_resnet.py"
MEDIUM = {"layers": "4", "hidden": "384", "heads": "6", "seq": "256", "vocab": "2048", "batch": "4"}
TINY = {"layers": "4", "hidden": "64", "heads": "4", "seq": "16", "vocab": "256", "batch": "2"}
IMAGES = {"factor": "1", "depths": "2,2,2,2", "width": "32", "classes": "100", "image": "64", "batch": "128"}
CASES = {
    "gpt-single": Case(GPT, MEDIUM, "single", 1.02),
    "gpt-data": Case(GPT, MEDIUM, "data", 1.02),
    "gpt-zero3": Case(GPT, MEDIUM, "zero3", 1.05),
    "gpt-tensor": Case(GPT, MEDIUM, "tensor", 1.00),
    "gpt-tensor-small": Case(GPT, TINY, "tensor", 0.5),
    "gpt-pipeline": Case(GPT, MEDIUM, "pipeline", 1.02, num_microbatches=4),
    "resnet-single": Case(RESNET, IMAGES, "single", 1.02),
    "resnet-data": Case(RESNET, IMAGES, "data", 1.02),
    "resnet-zero3": Case(RESNET, IMAGES, "zero3", 1.05),
    "resnet-pipeline": Case(RESNET, IMAGES, "pipeline", 1.02, num_microbatches=4),
}
QUICK = {"layers": "2", "hidden": "128", "heads": "4", "seq": "64", "vocab": "512", "batch": "4"}
QUICK_CASES = {
    "gpt-single": Case(GPT, QUICK, "single", 1.02),
    "gpt-data": Case(GPT, QUICK, "data", 1.02),
    "gpt-zero3": Case(GPT, QUICK, "zero3", 1.05),
    "gpt-tensor-small": Case(GPT, TINY, "tensor", 0.5),
    "gpt-pipeline": Case(GPT, QUICK, "pipeline", 1.02, num_microbatches=4),
}
PAIRS_S, QUICK_S = 30.0, 2.0
"""Of paired steps per case."""


@dataclass(frozen=True)
class Sample:
    """A run of steps: seconds until all ranks were done, CPU seconds of all ranks, largest share waited for a core."""

    wall_s: float
    cpu_s: float
    waited: float


@dataclass(frozen=True)
class Result:
    """A case, measured; pairs are (autopar, by hand).

    Attributes:
        step_s, cpu_s: of one step, medians; of calm pairs where there are enough, and of all.
        wall, cpu: median ratios; wall is None where too few pairs were calm.
        spread: half the range of the middle half of the ratio that counts, over the square root of their number.
        live_bytes, resident_bytes: of the rank where the ratio is worst.
        loss_error: largest relative difference of a loss.
    """

    case: str
    limit: float
    step_s: tuple[float, float]
    cpu_s: tuple[float, float]
    wall: float | None
    cpu: float
    spread: float
    num_pairs: int
    num_calm: int
    live_bytes: tuple[int, int]
    resident_bytes: tuple[int, int]
    loss_error: float
    notes: tuple[str, ...] = field(default=())

    @property
    def time_ratio(self) -> float:
        return self.cpu if self.wall is None else self.wall

    @property
    def memory_ratio(self) -> float:
        return self.live_bytes[0] / self.live_bytes[1]

    @property
    def resident_ratio(self) -> float:
        return self.resident_bytes[0] / self.resident_bytes[1]

    def __str__(self) -> str:
        wall = "-" if self.wall is None else f"{self.wall:.3f}"
        live, resident = ("/".join(f"{n / 1e6:.1f}" for n in pair) for pair in (self.live_bytes, self.resident_bytes))
        kind = "CPU" if self.wall is None else "wall"
        return (
            f"{self.case}: step {self.step_s[0]:.4f}/{self.step_s[1]:.4f} s, "
            f"CPU {self.cpu_s[0]:.4f}/{self.cpu_s[1]:.4f} s, "
            f"wall {wall} ({self.num_calm} calm of {self.num_pairs} pairs), CPU {self.cpu:.3f}, "
            f"losses {self.loss_error:.0e}, memory {self.memory_ratio:.3f} ({live} MB), "
            f"resident {self.resident_ratio:.3f} ({resident} MB), "
            f"{kind} <= {self.limit:g}: {self.time_ratio:.3f} +- {self.spread:.3f}"
        )


def worker(arguments: Mapping[str, Any]) -> None:
    """One rank: all cases, one after another; rank 0 prints what all ranks found, a line per case."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    for name, given in arguments["cases"].items():
        own = _measured(Case(**given["case"]), given["plan"], arguments["seconds"])
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        if dist.get_rank() == 0:
            print(json.dumps([name, ranks]), flush=True)


Step = Callable[[], float]


def _measured(case: Case, plan_text: str, seconds: float) -> dict[str, Any]:
    """Losses, memory and paired samples of one case on this rank."""
    losses = [[step() for _ in range(3)] for step in (make() for make in _makers(case, plan_text, "float64"))]
    makers = _makers(case, plan_text, "float32")
    _give_back()
    base = _status_bytes("VmRSS")
    residents = [(i, _resident_bytes(makers[i]) - base) for i in (0, 1, 1, 0)]
    peaks = [
        {"live": _live_bytes(make), "resident": min(size for j, size in residents if i == j)}
        for i, make in enumerate(makers)
    ]
    steps = [make() for make in makers]
    for step in steps:
        step()
    pairs = _pairs(steps, seconds)
    return {"losses": losses, "peaks": peaks, "pairs": [[asdict(sample) for sample in pair] for pair in pairs]}


def _makers(case: Case, plan_text: str, dtype: str) -> list[Callable[[], Step]]:
    """What builds autopar's step, and what builds the one by hand, from equal weights on an equal batch."""
    import handwritten
    import torch

    from autopar.capture.promote import promote
    from autopar.planner.assemble import make_executor
    from autopar.planner.execute import prepare, run_options
    from autopar.runtime.executor import join_plan

    plan = parse_plan(plan_text)
    ready = prepare(plan, "cpu")

    def cast(x: Any) -> Any:
        return x.to(getattr(torch, dtype)) if x.is_floating_point() else x

    graph = promote(ready.captured.graph, dtype) if dtype == "float64" else ready.captured.graph
    state, batch = {name: cast(x) for name, x in ready.state.items()}, [cast(x) for x in ready.batch]
    mesh = join_plan(graph, plan.decisions, "cpu")
    given = {name: cast(x) for name, x in ready.source.raw_batch().items()}
    weights = {name: x.clone() for name, x in ready.captured.module.state_dict().items()}
    prefix = len(next(iter(weights))) - len(next(iter(ready.source.build_model().state_dict())))
    # The graph's first block is what comes before the repeated ones.
    cut = {"count": plan.decisions.stages[0].stop - 1, "num_microbatches": case.num_microbatches}
    extra = cut if case.program == "pipeline" else {}

    def build() -> Step:
        executor = make_executor(graph, plan.decisions, state, mesh, run_options(plan, "cpu"))
        return partial(executor.step, batch)

    def build_by_hand() -> Step:
        with torch.device("meta"):
            model = ready.source.build_model()
        model.to_empty(device="cpu").load_state_dict({name[prefix:]: x for name, x in weights.items()})
        model = model.to(getattr(torch, dtype)).train()
        return partial(handwritten.PROGRAMS[case.program](model, **extra).step, given)

    return [build, build_by_hand]


def _resident_bytes(make: Callable[[], Step]) -> int:
    """Highest resident memory of this process while a program is built and takes two steps."""
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")
    step = make()
    for _ in range(2):
        step()
    return _status_bytes("VmHWM")


def _live_bytes(make: Callable[[], Step]) -> int:
    """Most that torch's allocator had handed out meanwhile, beside what there was before."""
    from autopar.profiler.live import LiveBytes

    _give_back()
    with LiveBytes() as live:
        step = make()
        for _ in range(2):
            step()
    return live.peak_bytes


def _give_back() -> None:
    """Collect garbage, and let the C library give free memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _pairs(steps: Sequence[Step], seconds: float) -> list[tuple[Sample, Sample]]:
    """Neighbouring samples of both programs until time is over, in turn one's and the other's first."""
    import torch
    import torch.distributed as dist

    gc.collect()
    gc.disable()
    took = [_sample(step, 1).wall_s for step in steps]
    count = max(1, math.ceil(SAMPLE_S / max(took)))
    deadline = time.monotonic() + seconds
    pairs: list[tuple[Sample, Sample]] = []
    while True:
        goes_on = torch.tensor([int(time.monotonic() < deadline)])
        dist.broadcast(goes_on, 0)
        if not goes_on.item():
            gc.enable()
            return pairs
        if len(pairs) % 2:
            other, own = _sample(steps[1], count), _sample(steps[0], count)
        else:
            own, other = _sample(steps[0], count), _sample(steps[1], count)
        pairs.append((own, other))


def _sample(step: Step, count: int) -> Sample:
    import torch
    import torch.distributed as dist

    dist.barrier()
    waited, cpu, began = _waited_s(), time.process_time(), time.perf_counter()
    for _ in range(count):
        step()
    dist.barrier()
    wall = time.perf_counter() - began
    cpu, waited = time.process_time() - cpu, _waited_s() - waited
    largest = torch.tensor([wall, waited / wall], dtype=torch.float64)
    total = torch.tensor([cpu], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return Sample(float(largest[0]) / count, float(total[0]) / count, float(largest[1]))


def _run(
    cases: Mapping[str, Case], num_processes: int, seconds: float, on_result: Callable[[Result], None]
) -> list[Result]:
    """The cases on so many processes."""
    chosen = {name: case for name, case in cases.items() if case.num_processes == num_processes}
    if not chosen:
        return []
    found: list[Result] = []

    def on_line(line: str) -> None:
        name, ranks = json.loads(line)
        found.append(_result(name, chosen[name], ranks))
        on_result(found[-1])

    given = {name: {"case": asdict(case), "plan": _plan(case)} for name, case in chosen.items()}
    launch_local(Job("execution:worker", {"seconds": seconds, "cases": given}, num_processes), on_line=on_line)
    return found


def _plan(case: Case) -> str:
    """The plan under the case's pins, as a file's text."""
    source = str(ROOT / case.model)
    count = 1 if case.program == "single" else PROCESSES
    request = PlanRequest(num_gpus=count, gpu="cpu", pins=case.pins, profile="none", use_all=True, with_baselines=False)
    captured = capture_graph(source, case.options, None)
    return dump_plan(make_plan(source, case.options, request, captured=captured).plan)


def _result(name: str, case: Case, ranks: Sequence[Mapping[str, Any]]) -> Result:
    pairs = [tuple(Sample(**sample) for sample in pair) for pair in ranks[0]["pairs"]]
    calm = [pair for pair in pairs if max(sample.waited for sample in pair) <= CALM]
    has_wall = len(calm) >= LEAST_CALM
    walls = [own.wall_s / other.wall_s for own, other in (calm if has_wall else pairs)]
    cpus = [own.cpu_s / other.cpu_s for own, other in pairs]
    peaks = [[rank["peaks"][i] for rank in ranks] for i in range(2)]
    live, resident = (
        max(zip(*([peak[kind] for peak in found] for found in peaks), strict=True), key=lambda pair: pair[0] / pair[1])
        for kind in ("live", "resident")
    )
    return Result(
        name,
        case.limit,
        tuple(statistics.median(pair[i].wall_s for pair in (calm if has_wall else pairs)) for i in range(2)),
        tuple(statistics.median(pair[i].cpu_s for pair in pairs) for i in range(2)),
        statistics.median(walls) if has_wall else None,
        statistics.median(cpus),
        _spread(walls if has_wall else cpus),
        len(pairs),
        len(calm),
        live,
        resident,
        _loss_error(name, case, ranks),
    )


def _spread(ratios: Sequence[float]) -> float:
    if len(ratios) < 4:
        return math.inf
    low, _, high = statistics.quantiles(ratios, n=4)
    return (high - low) / 2 / math.sqrt(len(ratios))


def _loss_error(name: str, case: Case, ranks: Sequence[Mapping[str, Any]]) -> float:
    """Largest relative difference; what the ranks know of the other program's loss is put together first.

    Raises:
        VerifyError: the programs do not compute the same losses.
    """
    own = ranks[0]["losses"][0]
    others = [rank["losses"][1] for rank in ranks]
    if case.program in ("data", "zero3"):
        whole = [statistics.mean(parts) for parts in zip(*others, strict=True)]
    else:
        whole = others[-1]
    error = max(abs(a - b) / abs(b) for a, b in zip(own, whole, strict=True))
    if not error <= LOSS_TOLERANCE:
        raise VerifyError(f"{name}: autopar's losses are {own}, by hand they are {whole}")
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="small models, few steps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, help=f"of paired steps; default {PAIRS_S:g}, with --quick {QUICK_S:g}")
    arguments = parser.parse_args()
    known = QUICK_CASES if arguments.quick else CASES
    unknown = sorted(set(arguments.cases) - set(known))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in arguments.cases or known}
    seconds = arguments.seconds or (QUICK_S if arguments.quick else PAIRS_S)
    began = time.monotonic()

    def show(result: Result) -> None:
        if not arguments.json:
            print(result, flush=True)

    found = [result for count in (1, PROCESSES) for result in _run(chosen, count, seconds, show)]
    late = [r.case for r in found if r.time_ratio > r.limit or r.memory_ratio > MEMORY_LIMIT]
    took_s = time.monotonic() - began
    if arguments.json:
        rows = [asdict(r) | {"time_ratio": r.time_ratio, "memory_ratio": r.memory_ratio} for r in found]
        print(json.dumps({"cases": rows, "over_limit": late, "took_s": took_s}, indent=1))
    else:
        within = f"{len(found) - len(late)} of {len(found)} cases within their limits"
        print(f"{within}{f'; over: {late}' if late else ''}; took {took_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
