"""Ways out of a lack of memory that the search does not know: what could be offloaded, each tried by a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from autopar.cost.mixed import MixedCluster
from autopar.errors import InfeasibleError, InputError, Remedy
from autopar.ir.solution import Limits, Pins
from autopar.search.baselines import best_of_family
from autopar.units import format_bytes, format_joules, format_seconds

if TYPE_CHECKING:
    from autopar.planner.choose import Chooser

TRIAL_S = 20.0
"""Wall-clock limit on the search for one of them."""


def with_offloads(chooser: Chooser, error: InfeasibleError) -> InfeasibleError:
    """The error with offloads that let plans fit, where memory alone binds; the least of them that do.

    States of the optimizer alone come before activations alone, and these before both.
    """
    cluster = chooser.target.cluster
    if error.limit != "memory" or isinstance(cluster, MixedCluster) or chooser.graph.is_inference:
        return error
    place = "disk" if cluster.spec.kind == "cpu" else "host"
    found: list[Remedy] = []
    for pins in _offloads(chooser.request.pins, place):
        if len(found) == 1 and pins.offload_optimizer and pins.offload_activations:
            break
        remedy = _tried(chooser, pins)
        found += [remedy] if remedy is not None else []
    return InfeasibleError(error.limit, error.need, error.have, (*error.remedies[:-1], *found, *error.remedies[-1:]))


def _offloads(pins: Pins, place: str) -> Iterator[Pins]:
    """The pins with more offloaded than they say."""
    for optimizer, activations in ((True, False), (False, True), (True, True)):
        changed = replace(
            pins,
            offload_optimizer=pins.offload_optimizer or (place if optimizer else None),
            offload_activations=pins.offload_activations or (place if activations else None),
        )
        if changed != pins:
            yield changed


def _tried(chooser: Chooser, pins: Pins) -> Remedy | None:
    """The way out that the pins are, if a plan under them fits and keeps the limits."""
    request = replace(chooser.request, pins=pins, with_baselines=False)
    own = replace(chooser, request=request)
    try:
        tables = own.tables(pins)
    except InputError:  # it cannot be had beside another choice of the user's
        return None
    family = best_of_family(
        tables, request.objective, pins=own.searched(pins), limits=Limits(), use_all=request.use_all,
        time_limit_s=TRIAL_S,
    )  # fmt: skip
    if family.solution is None:
        return None
    candidate = own.candidate(tables, family.solution.decisions)
    if not own.is_kept(candidate):
        return None
    predicted = candidate.prediction
    peak = max(quantity.value for quantity in predicted.peak_memory_bytes)
    figures = f"{format_seconds(predicted.step_time_s.value)}, {format_joules(predicted.energy_j.value)}"
    new = {"offload_optimizer": pins.offload_optimizer, "offload_activations": pins.offload_activations}
    words = ",".join(f"{name}={place}" for name, place in new.items() if place)
    return Remedy(f"--pin {words}", f"{figures} and {format_bytes(peak)} per device with the rest offloaded")
