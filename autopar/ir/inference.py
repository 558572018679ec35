"""Inference plans: how a plan says that it runs forward alone, and the rates that follow from its figures.

The mode is an option of the model beside those of `--set`, since it decides what is captured: everything that builds
the plan's model again gets it with them.
"""

from __future__ import annotations

from autopar.errors import InputError
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity

MODE_OPTION = "autopar:mode"
"""Option that a model is captured with for inference; absent for training."""
TRAINING, INFERENCE = "training", "inference"
MODES = (TRAINING, INFERENCE)


def is_inference(plan: Plan) -> bool:
    """The plan runs forward alone."""
    return plan.model.options.get(MODE_OPTION) == INFERENCE


def require_training(plan: Plan, command: str) -> None:
    """Raises InputError for a plan of inference, which `command` has no use for."""
    if is_inference(plan):
        raise InputError(f"{command} is for plans that train, and this one is for inference (--mode inference)")
