"""A rival: the best plan for the same model and cluster under other pins."""

from __future__ import annotations

from dataclasses import replace

from autopar.errors import PlanMismatchError
from autopar.ir.offload import NOWHERE
from autopar.ir.pin_fields import parse_pin_fields
from autopar.ir.plan import Plan
from autopar.ir.solution import KEPT, Pins
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest, Progress


def request_of(plan: Plan, pins: Pins) -> PlanRequest:
    """The request that the plan answers, with other pins."""
    mixed = plan.cluster.description
    return PlanRequest(
        num_gpus=plan.cluster.num_gpus,
        cluster=mixed,
        gpu=plan.cluster.gpu if mixed is None else None,
        gpus_per_node=plan.cluster.gpus_per_node if mixed is None else None,
        memory_bytes=plan.cluster.memory_bytes if mixed is None else None,
        network_bytes_per_s=plan.cluster.network_bytes_per_s,
        gpu_power_limit_w=plan.cluster.gpu_power_limit_w,
        objective=plan.objective,
        limits=plan.limits,
        pins=pins,
        batch_size=plan.model.batch_size,
        software=plan.software,
    )


def made_under(plan: Plan) -> Pins:
    """The pins that the plan was made under, as far as its file says. Raises PlanMismatchError."""
    try:
        return parse_pin_fields(plan.pinned)
    except ValueError as error:
        raise PlanMismatchError(
            f"the plan's pins cannot be read ({error}); make it again with 'autopar plan'"
        ) from error


def policy_pins(plan: Plan) -> Pins:
    """Pins under which tables price what the plan's stages compute again, and what it offloads."""
    kept = sorted({stage.recompute for stage in plan.decisions.stages} & set(KEPT[1:]))
    return replace(offload_pins(plan), recompute=kept[0] if kept else None)


def offload_pins(plan: Plan) -> Pins:
    """Pins under which a plan offloads what this one does."""
    offload = plan.decisions.offload
    optimizer, activations = (None if p == NOWHERE else p for p in (offload.optimizer, offload.activations))
    return Pins(offload_optimizer=optimizer, offload_activations=activations)


def make_rival(plan: Plan, pins: Pins, progress: Progress | None = None) -> Plan:
    """Plan the same model again under `pins`.

    Raises:
        PlanMismatchError: the model is no longer the one that the plan was made for.
        InfeasibleError: no plan satisfies the pins.
    """
    rival = plan_model(plan.model.source, plan.model.options, request_of(plan, pins), progress)
    check_unchanged(plan, rival.model.graph_hash)
    return rival


def check_unchanged(plan: Plan, graph_hash: str) -> None:
    """Raises PlanMismatchError unless the model that is there now, of this hash, is the plan's."""
    if graph_hash != plan.model.graph_hash:
        raise PlanMismatchError(
            f"{plan.model.source} has changed since the plan was made: its graph hash is "
            f"{graph_hash[:12]}, the plan's {plan.model.graph_hash[:12]}; make the plan again"
        )
