"""Objectives from prices."""

from __future__ import annotations

import math

from autopar.errors import InputError
from autopar.ir.solution import Objective

SECONDS_PER_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6


def cost_objective(gpu_hour_price: float | None, energy_price: float | None) -> Objective:
    """Least cost of a step: GPU-hours and kilowatt-hours (GPUs and hosts) at the user's prices, in one currency.

    Raises:
        InputError: a price is missing or negative, or both are 0.
    """
    prices = (gpu_hour_price, energy_price)
    if gpu_hour_price is None or energy_price is None:
        raise InputError(
            "the objective cost needs both prices: --gpu-hour-price (per GPU and hour) and --energy-price (per kWh); "
            "0 leaves one out"
        )
    if not all(price is not None and 0 <= price < math.inf for price in prices) or not any(prices):
        raise InputError("--gpu-hour-price and --energy-price must be at least 0, and one of them above 0")
    return Objective(
        "cost", energy_weight=energy_price / JOULES_PER_KWH, gpu_second_weight=gpu_hour_price / SECONDS_PER_HOUR
    )
