"""autopar: plans, prices and runs the parallelisation of a PyTorch model.

Importing this package imports no torch: the names below load what they need when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopar.version import __version__

if TYPE_CHECKING:
    from autopar.api import autoparallel, parallelize, plan
    from autopar.errors import AutoparError, InfeasibleError
    from autopar.ir.plan import Plan
    from autopar.ir.serialize import load_plan, save_plan

__all__ = [
    "AutoparError",
    "InfeasibleError",
    "Plan",
    "__version__",
    "autoparallel",
    "load_plan",
    "parallelize",
    "plan",
    "save_plan",
]

_HOME_BY_NAME = {
    "AutoparError": "autopar.errors",
    "InfeasibleError": "autopar.errors",
    "Plan": "autopar.ir.plan",
    "autoparallel": "autopar.api",
    "load_plan": "autopar.ir.serialize",
    "parallelize": "autopar.api",
    "plan": "autopar.api",
    "save_plan": "autopar.ir.serialize",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home module (PEP 562)."""
    if name not in _HOME_BY_NAME:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME_BY_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
