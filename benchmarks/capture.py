"""Capture of Llama models: CPU seconds and memory, with alike layers copied and, to compare, with every layer traced.

    python benchmarks/capture.py [FILE...] [--quick] [--json] [--every-layer]

FILE is a model file that takes the sizes below (default: examples/llama.py). Each case runs in a process of its own;
importing torch and transformers is not counted. --every-layer also traces every layer and fails (exit code 1) unless
the graphs are equal in every field. --quick leaves out the curve over the number of layers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "llama.py"
SIZES = {
    "1.5B": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "batch": 16, "seq": 2048},
    "8B": {},
    "70B": {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672},
    "405B": {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248},
}
"""Options of the example; Llama 3 by Grattafiori et al. 2024, table 3; the 1.5B one has 1.5 times the usual ffn."""
CURVE = (2, 4, 8, 16, 32, 64, 128)
"""Layers of the 8B model."""


def measure(path: str, options: dict[str, Any], every_layer: bool) -> dict[str, Any]:
    """Figures of one case, in this process."""
    import torch.export
    from transformers import LlamaForCausalLM

    from autopar.capture.export import capture
    from autopar.capture.source import load_source

    assert LlamaForCausalLM.__module__
    assert torch.export.export
    source = load_source(path, {key: str(value) for key, value in options.items()})
    started, wall = time.process_time(), time.perf_counter()
    captured = capture(source)
    found: dict[str, Any] = {
        "cpu_s": time.process_time() - started,
        "wall_s": time.perf_counter() - wall,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "ops": len(captured.graph.ops),
        "notes": list(captured.notes),
    }
    if every_layer:
        started = time.process_time()
        whole = capture(source, every_layer=True)
        found |= {"every_layer_cpu_s": time.process_time() - started, "equal": whole.graph == captured.graph}
    return found


def measure_apart(path: str, options: dict[str, Any], every_layer: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    case = json.dumps({"path": path, "options": options, "every_layer": every_layer})
    done = subprocess.run([sys.executable, __file__, "--here", case], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def line(found: dict[str, Any]) -> str:
    text = f"{found['file']} {found['case']:<11} {found['ops']:6} ops  {found['rss_bytes'] / 2**30:.2f} GiB  "
    if "equal" in found:
        same = "the same graph" if found["equal"] else "ANOTHER GRAPH"
        text += f"every layer {found['every_layer_cpu_s']:.2f} CPU s, {same}  "
    return text + f"capture {found['cpu_s']:.2f} CPU s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", default=[str(EXAMPLE)])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--every-layer", action="store_true")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(**json.loads(arguments.here))))
        return 0
    cases = {**SIZES, **({} if arguments.quick else {f"{n} layers": {"layers": n} for n in CURVE})}
    rows = []
    for file in arguments.files:
        for name, options in cases.items():
            figures = measure_apart(file, options, arguments.every_layer)
            rows.append({"file": Path(file).name, "case": name, **figures})
            if not arguments.json:
                print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=2, sort_keys=True))
    return 0 if all(row.get("equal", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
