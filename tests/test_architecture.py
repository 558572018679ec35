"""The shape of the code, read from its syntax trees: layers, third-party imports, sizes, honesty.

Proven to see: each rule is also run on a planted violation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

BASE = ("errors", "units", "resources", "version")
STAGES = ("capture", "cost", "profiler", "report", "rewrite", "runtime", "search")
BELOW_STAGES = (*BASE, "ir", "rules")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(BASE, ("errors", "units")),
    "ir": BASE,
    "rules": (*BASE, "ir"),
    "nvml": BASE,
    "meters": (*BASE, "ir", "nvml"),
    "clocks": (*BASE, "ir", "nvml"),
    "torch_adapter": BELOW_STAGES,
    "capture": (*BELOW_STAGES, "torch_adapter"),
    "cost": BELOW_STAGES,
    "search": BELOW_STAGES,
    "report": BELOW_STAGES,
    "rewrite": (*BELOW_STAGES, "program", "torch_adapter"),
    "profiler": (*BELOW_STAGES, "program", "meters", "torch_adapter"),
    # What a rank executes: rewrite builds programs, runtime runs them, profiler measures their redistributions.
    "program": (*BELOW_STAGES, "torch_adapter"),
    "runtime": (*BELOW_STAGES, "program", "meters", "torch_adapter"),
    "planner": (*BELOW_STAGES, *STAGES, "clocks", "meters", "nvml", "torch_adapter"),
    "api": (*BELOW_STAGES, "planner", "report"),
    "cli": (*BELOW_STAGES, "planner", "report", "api"),
    "": (*BASE, "ir", "api"),
    "__main__": ("cli",),
}
"""Package below `autopar` -> packages it may import, besides itself. "" is `autopar/__init__.py`."""

TORCH = ("capture", "profiler", "program", "rewrite", "runtime", "torch_adapter", "api", "planner")
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "torch": TORCH,
    "transformers": ("capture",),
    "ortools": ("search",),
    "networkx": ("search", "ir", "cost", "capture"),
    "pynvml": ("nvml",),
    "click": ("cli",),
    "matplotlib": ("report",),
}
"""Distribution -> packages that may import it. numpy may be imported anywhere."""
TORCH_FREE_AT_IMPORT = ("planner", "api")
"""These import torch, and torch-bound stages, only inside the functions that need them."""
TORCH_BOUND_MODULES = (
    "autopar.planner.materialise",
    "autopar.planner.power",
)
"""Except for these, which are themselves imported only there."""


@dataclass(frozen=True)
class Import:
    """One import statement: `module` in dotted form, and whether it runs when the file is imported."""

    module: str
    line: int
    is_top_level: bool


def imports_of(tree: ast.Module) -> Iterator[Import]:
    """All imports but those under `if TYPE_CHECKING`."""
    hidden = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{a.name}" if node.module == "autopar" else node.module for a in node.names]
        for name in names:
            yield Import(name, node.lineno, id(node) not in hidden)


def package_of(path: str) -> str:
    """`autopar/cost/table.py` -> `cost`; `autopar/__init__.py` -> ``."""
    parts = path.removesuffix(".py").split("/")[1:]
    return "" if parts == ["__init__"] else parts[0]


def module_of(path: str) -> str:
    """`autopar/cost/table.py` -> `autopar.cost.table`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer_faults(path: str, tree: ast.Module) -> Iterator[str]:
    """Imports that point up or sideways, or to a library that belongs elsewhere."""
    package = package_of(path)
    if package not in MAY_IMPORT:
        yield f"{path}: package {package!r} has no row in the import table"
        return
    for item in imports_of(tree):
        first, *rest = item.module.split(".")
        where = f"{path}:{item.line}: {package or 'autopar'} imports {item.module}"
        if first == "autopar" and rest and rest[0] not in (package, *MAY_IMPORT[package]):
            yield where
        if first in THIRD_PARTY and package not in THIRD_PARTY[first]:
            yield where
        is_torch_free = package in TORCH_FREE_AT_IMPORT and module_of(path) not in TORCH_BOUND_MODULES
        if is_torch_free and item.is_top_level and _is_torch_bound(item.module):
            yield f"{where} at import time"


def _is_torch_bound(module: str) -> bool:
    first, *rest = module.split(".")
    bound = ("capture", "profiler", "program", "rewrite", "runtime", "torch_adapter")
    is_bound = module in TORCH_BOUND_MODULES or (first == "autopar" and bool(rest) and rest[0] in bound)
    return first == "torch" or is_bound


def size_faults(path: str, text: str, tree: ast.Module) -> Iterator[str]:
    """Files and functions that are too long."""
    if (length := len(text.splitlines())) >= MAX_FILE_LINES:
        yield f"{path}: {length} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            span = (node.end_lineno or node.lineno) - node.lineno + 1
            if span >= MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {span} lines"


def honesty_faults(path: str, tree: ast.Module) -> Iterator[str]:
    """`NotImplementedError`, `print` in the library, and private torch modules outside the adapter."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield f"{path}:{node.lineno}: NotImplementedError"
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if is_print and package_of(path) != "runtime":  # workers speak to their parent on stdout
            yield f"{path}:{node.lineno}: print"
    if package_of(path) != "torch_adapter":
        yield from (
            f"{path}:{item.line}: private torch module {item.module}"
            for item in imports_of(tree)
            if item.module.startswith("torch.") and any(part.startswith("_") for part in item.module.split("."))
        )


def module_graph(trees: dict[str, ast.Module]) -> nx.DiGraph:
    """Modules and their top-level imports of each other."""
    graph = nx.DiGraph()
    modules = {module_of(path): path for path in trees}
    for module, path in modules.items():
        for item in imports_of(trees[path]):
            if item.is_top_level and item.module in modules and item.module != module:
                graph.add_edge(module, item.module)
    return graph


def sources() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "autopar").rglob("*.py"))}


def test_imports_point_down() -> None:
    assert [fault for path, text in sources().items() for fault in layer_faults(path, ast.parse(text))] == []


def test_files_and_functions_stay_short() -> None:
    everywhere = {
        str(p.relative_to(ROOT)): p.read_text()
        for d in ("tests", "examples", "benchmarks")
        for p in (ROOT / d).rglob("*.py")
    }
    everywhere |= sources()
    assert [fault for path, text in everywhere.items() for fault in size_faults(path, text, ast.parse(text))] == []


def test_nothing_is_promised_and_not_done() -> None:
    assert [fault for path, text in sources().items() for fault in honesty_faults(path, ast.parse(text))] == []


def test_there_is_no_import_cycle() -> None:
    trees = {path: ast.parse(text) for path, text in sources().items()}
    assert list(nx.simple_cycles(module_graph(trees))) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("autopar/cost/x.py", "from autopar.search.solve import search"),
        ("autopar/ir/x.py", "import autopar.rules.strategies"),
        ("autopar/rules/x.py", "import torch"),
        ("autopar/cost/x.py", "def f():\n    from ortools.math_opt.python import mathopt"),
        ("autopar/planner/x.py", "from autopar.capture.export import capture"),
        ("autopar/novel/x.py", ""),
    ],
)
def test_a_planted_layer_violation_is_caught(path: str, line: str) -> None:
    assert list(layer_faults(path, ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["raise NotImplementedError", "print(1)", "from torch._export import x", "from torch.fx._graph import y"]
)
def test_a_planted_dishonesty_is_caught(line: str) -> None:
    assert list(honesty_faults("autopar/ir/x.py", ast.parse(line)))


def test_a_planted_giant_is_caught() -> None:
    text = "def f():\n" + "    x = 1\n" * MAX_FILE_LINES
    assert len(list(size_faults("autopar/ir/x.py", text, ast.parse(text)))) == 2


def test_a_planted_cycle_is_caught() -> None:
    planted = {"autopar/ir/a.py": "import autopar.ir.b", "autopar/ir/b.py": "import autopar.ir.a"}
    assert list(nx.simple_cycles(module_graph({path: ast.parse(text) for path, text in planted.items()})))
