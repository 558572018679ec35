"""How long planning takes: capture, prices and search, each case in a process of its own.

    python benchmarks/planning.py [CASE...] [--quick] [--json] [--curves] [--objective time|energy] [--baselines]

CASE is one of the models and meshes below, or an example (`gpt2`, ..., on --gpus devices). CPU and wall seconds leave
out importing torch and transformers. Variables are strategies plus pairs of strategies of the largest cost table.
--curves: layers of a block that repeats (64 GPUs), and GPUs (one model). --baselines also searches the well-known ways
to split that `autopar plan` prints beside its plan.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ("gpt2", "llama", "bert", "vit", "resnet", "t5", "mixtral", "alexnet", "unet", "mlp")
LLAMA_1B = {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192}
LLAMA_7B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008, "vocab": 32000}
LLAMA_70B = {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "batch": 1024}
LLAMA_405B = {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "batch": 2048, "seq": 8192}
CURVE_LAYERS = (2, 4, 8, 16, 32, 64, 128)
CURVE_GPUS = (8, 64, 512, 4096, 16384)
AUTOPARALLEL = "meta autoparallel: {} CPU s on another 2-core machine"
GALVATRON = "Galvatron: 172 CPU s on another 2-core machine"


@dataclass(frozen=True)
class Case:
    """`pins` are (dp, tp) or None; `peer` is a published or measured figure of another planner, on another machine."""

    name: str
    example: str
    num_gpus: int
    options: dict[str, int] = field(default_factory=dict)
    pins: tuple[int, int] | None = None
    peer: str = ""


CASES = (
    Case("llama-1.5b-8", "llama", 8, LLAMA_1B, peer=AUTOPARALLEL.format(26)),
    Case("llama-1.5b-(8,)", "llama", 8, LLAMA_1B, (8, 1), AUTOPARALLEL.format(26)),
    Case("llama-1.5b-(2,4)", "llama", 8, LLAMA_1B, (2, 4), AUTOPARALLEL.format(247)),
    Case("gpt2-124m-(8,)", "gpt2", 8, {}, (8, 1)),
    Case("gpt2-124m-(2,4)", "gpt2", 8, {}, (2, 4)),
    Case("llama-2-7b-8", "llama", 8, LLAMA_7B, peer=GALVATRON),
    Case("llama-3-8b-64", "llama", 64),
    Case("llama-3-70b-1024", "llama", 1024, LLAMA_70B),
    Case("llama-3-405b-16384", "llama", 16384, LLAMA_405B),
)
QUICK = ("llama-1.5b-8", "llama-1.5b-(2,4)", "gpt2-124m-(2,4)")


def curves() -> tuple[Case, ...]:
    """Cases of both curves; the batch is that of the example, so that only one thing changes."""
    layers = tuple(Case(f"layers-{n}", "llama", 64, {"layers": n}) for n in CURVE_LAYERS)
    return (*layers, *(Case(f"gpus-{n}", "llama", n) for n in CURVE_GPUS))


def run(case: Case, objective: str, baselines: bool) -> dict[str, Any]:
    """Figures of one case, in this process."""
    import torch.export
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.__module__
    assert torch.export.export
    from autopar.cost.table import CostTables
    from autopar.ir.cost import CostTable
    from autopar.ir.mesh import StageMesh
    from autopar.ir.solution import Objective, Pins
    from autopar.planner import choose
    from autopar.planner.plan import PlanRequest, make_plan

    made: set[tuple[int, StageMesh, int]] = set()
    variables = [0]

    class Counted(CostTables):
        """Counts what it makes."""

        def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
            found = super().table(mesh, num_microbatches)
            if found is not None and (id(self), mesh, num_microbatches) not in made:
                made.add((id(self), mesh, num_microbatches))
                pairs = sum(edge.forward_s.size for edge in found.edges)
                variables[0] = max(variables[0], pairs + sum(len(node.choices) for node in found.nodes))
            return found

    vars(choose)["CostTables"] = Counted
    pins = Pins() if case.pins is None else Pins(dp=case.pins[0], tp=case.pins[1])
    request = PlanRequest(
        case.num_gpus, gpu="h100-sxm-80gb", objective=Objective(objective), pins=pins, profile="none",
        with_baselines=baselines,
    )  # fmt: skip
    options = {name: str(value) for name, value in case.options.items()}
    phases: list[tuple[str, float]] = []
    cpu, wall = time.process_time(), time.perf_counter()

    def tell(phrase: str) -> None:
        phases.append((phrase, time.process_time() - cpu))

    plan = make_plan(str(ROOT / "examples" / f"{case.example}.py"), options, request, tell).plan
    decisions = plan.decisions
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "capture_cpu_s": next((at for phrase, at in phases if phrase.startswith("search")), 0.0),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tables": len(made), "variables": variables[0],
        "gap": plan.solver.gap, "num_gpus": decisions.num_gpus,
        "mesh": [len(decisions.stages), *decisions.mesh.sizes], "num_microbatches": decisions.num_microbatches,
    }  # fmt: skip


def measure(case: Case, objective: str, baselines: bool) -> dict[str, Any]:
    """Figures of one case in a fresh process; raises CalledProcessError if it fails."""
    task = json.dumps({"case": asdict(case), "objective": objective, "baselines": baselines})
    command = [sys.executable, __file__, "--child", task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"case": case.name, "peer": case.peer, **json.loads(done.stdout.splitlines()[-1])}


def line(row: dict[str, Any]) -> str:
    """One case as text, ending in its CPU seconds (and a peer's)."""
    mesh = "x".join(map(str, row["mesh"]))
    peer = f"  [{row['peer']}]" if row["peer"] else ""
    return (
        f"{row['case']:<19} pp x mesh {mesh:<9} m {row['num_microbatches']:<3} gap {row['gap']:.3%} "
        f"tables {row['tables']:<4} variables {row['variables']:<7} peak {row['rss_bytes'] / 2**30:.2f} GiB "
        f"wall {row['wall_s']:.2f} s capture {row['capture_cpu_s']:.2f} CPU s in all {row['cpu_s']:.2f} CPU s{peer}"
    )


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """What the command line asks for; exits with 2 for a name that is none."""
    known = {case.name: case for case in CASES}
    known |= {name: Case(f"{name}-{options.gpus}", name, options.gpus) for name in EXAMPLES}
    for name in options.names:
        if name not in known:
            sys.exit(f"unknown case {name!r}; known: {', '.join(known)}")
    if options.curves and not options.names:
        return list(curves())
    return [known[name] for name in options.names or (QUICK if options.quick else [case.name for case in CASES])]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Planning time.")
    parser.add_argument("names", nargs="*", metavar="CASE")
    parser.add_argument("--gpus", type=int, default=8, help="devices of the examples")
    parser.add_argument("--objective", choices=("time", "energy"), default="time")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--quick", action="store_true", help="three cases, under 50 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task = json.loads(options.child)
        print(json.dumps(run(Case(**task["case"]), task["objective"], task["baselines"])))
        return
    rows = []
    for case in chosen_cases(options):
        rows.append(measure(case, options.objective, options.baselines))
        if not options.json:
            print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
