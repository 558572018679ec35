"""What the processes of the tests of inference do."""

from __future__ import annotations

from typing import Any

from autopar.planner.infer import verify_worker


def plans(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The report of each plan beside the serial model, in float64."""
    return [
        {"case": name, **verify_worker({"plan": text, "dtype": "float64", "tolerance": 1e-10})}
        for name, text in arguments["plans"].items()
    ]
