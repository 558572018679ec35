"""Objectives from prices and carbon: everything linear becomes weights of seconds and joules.

    cost    GPUs * s / 3600 * (rental, or purchase price / (years * 8760 h * utilisation)) + PUE * kWh * price per kWh
    carbon  GPUs * s / 3600 * embodied g per GPU-hour + PUE * kWh * g per kWh

kWh are those of GPUs and hosts, PUE makes them the facility's. With a tariff by hour, its mean stands for price and
carbon intensity: over the day, or over a job that starts at its best hour. All of these numbers are the user's and
therefore `assumed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.ir.solution import Objective
from autopar.planner.tariff import Job, Tariff

SECONDS_PER_HOUR = 3600.0
HOURS_PER_YEAR = 8760.0
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Economy:
    """What energy, GPUs and carbon are assumed to cost; None: not given. Money is in one currency throughout.

    Attributes:
        pue: energy of the facility over that of its GPUs and hosts, >= 1.
        energy_price: per kWh at the meter, at any hour.
        grid_carbon_g: gCO2e per kWh, at any hour.
        gpu_hour_price: rental of a GPU.
        gpu_price: purchase price of a GPU with its share of the host, in place of a rental.
        lifetime_years, utilisation: over which and how much of which a bought GPU works.
        embodied_g_per_gpu_hour: gCO2e of making the GPU, per hour of use.
        tariff: rates by hour, in place of `energy_price` or `grid_carbon_g`.
        job: how long a run is and when it may start, with a tariff.
    """

    pue: float = 1.0
    energy_price: float | None = None
    grid_carbon_g: float | None = None
    gpu_hour_price: float | None = None
    gpu_price: float | None = None
    lifetime_years: float = 4.0
    utilisation: float = 0.8
    embodied_g_per_gpu_hour: float | None = None
    tariff: Tariff | None = None
    job: Job | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.pue < math.inf:
            raise InputError(f"--pue is energy of the facility over that of its machines, at least 1, got {self.pue:g}")
        names = ("energy_price", "grid_carbon_g", "gpu_hour_price", "gpu_price", "embodied_g_per_gpu_hour")
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{FLAGS[name]} must be at least 0, got {value:g}")
        if not (0 < self.lifetime_years < math.inf and 0 < self.utilisation <= 1):
            raise InputError("--lifetime must be above 0 years, and --utilisation above 0 and at most 1")
        if self.gpu_price is not None and self.gpu_hour_price is not None:
            raise InputError("a GPU is rented (--gpu-hour-price) or bought (--gpu-price): give one of them")
        for name, hourly in (("energy_price", self._hourly[0]), ("grid_carbon_g", self._hourly[1])):
            if hourly is not None and getattr(self, name) is not None:
                raise InputError(f"the tariff says what {FLAGS[name]} would: give one of them")
        if self.job is not None and self.tariff is None:
            raise InputError("--steps and --window look for the best start under a --tariff: give one")

    @property
    def _hourly(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        return (None, None) if self.tariff is None else (self.tariff.prices, self.tariff.carbon_g)

    @property
    def gpu_rate(self) -> float | None:
        """Per GPU and hour, rented or bought."""
        if self.gpu_price is None:
            return self.gpu_hour_price
        return self.gpu_price / (self.lifetime_years * HOURS_PER_YEAR * self.utilisation)

    @property
    def mean_price(self) -> float | None:
        """Per kWh, over the day."""
        return _mean(self._hourly[0], self.energy_price)

    @property
    def mean_carbon_g(self) -> float | None:
        """gCO2e per kWh, over the day."""
        return _mean(self._hourly[1], self.grid_carbon_g)


FLAGS = {
    "pue": "--pue",
    "energy_price": "--energy-price",
    "grid_carbon_g": "--grid-carbon",
    "gpu_hour_price": "--gpu-hour-price",
    "gpu_price": "--gpu-price",
    "embodied_g_per_gpu_hour": "--embodied-carbon",
}
"""Where each number of an `Economy` comes from on the command line."""


def objective_of(kind: str, economy: Economy, rates: tuple[float | None, float | None] | None = None) -> Objective:
    """The objective `cost` (currency) or `carbon` (gCO2e) of a step.

    Args:
        rates: price and gCO2e per kWh while the job runs; None: means of the day.

    Raises:
        InputError: a price or carbon intensity that it needs is missing, or all are 0.
    """
    price, carbon_g = rates or (economy.mean_price, economy.mean_carbon_g)
    if kind == "cost":
        hour, kwh = economy.gpu_rate, price
        if hour is None or kwh is None:
            raise InputError(
                "the objective cost needs both prices: of a GPU and hour (--gpu-hour-price, or --gpu-price to buy it) "
                "and of a kWh (--energy-price or --tariff); 0 leaves one out"
            )
        wanted = "--gpu-hour-price and --energy-price must be at least 0, and one of them above 0"
    else:
        hour, kwh = economy.embodied_g_per_gpu_hour or 0.0, carbon_g
        if kwh is None:
            raise InputError("the objective carbon needs gCO2e per kWh: --grid-carbon, or a --tariff that has it")
        wanted = "--grid-carbon and --embodied-carbon must be at least 0, and one of them above 0"
    if not hour > 0 and not kwh > 0:
        raise InputError(wanted)
    return Objective(
        kind,
        energy_weight=economy.pue * kwh / JOULES_PER_KWH,
        gpu_second_weight=hour / SECONDS_PER_HOUR,
        pue=economy.pue,
    )


def _mean(hourly: tuple[float, ...] | None, flat: float | None) -> float | None:
    return flat if hourly is None else math.fsum(hourly) / len(hourly)
