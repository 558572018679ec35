"""Planning a model again for another number of devices, under the request that its plan answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autopar.errors import AutoparError, InfeasibleError, InputError, PlanMismatchError
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.solution import Pins
from autopar.planner.choose import describe
from autopar.planner.recall import Command, finished_plan
from autopar.planner.request import say_nothing
from autopar.planner.rival import check_unchanged, made_under, offload_pins, request_of

REPLAN_LIMIT_S = 60.0
"""Of a search after a failure: devices wait for it."""
SHAPE: Mapping[str, Any] = {
    name: getattr(Pins(), name)
    for name in ("dp", "tp", "pp", "num_microbatches", "interleave", "ep", "cp", "sequence", "meshes")
}
"""Pins that fit one number of devices, free."""
Say = Callable[[str], None]


def plan_again(plan: Plan, num_gpus: int, say: Say | None = None) -> Plan:
    """The same request for another number of devices, from the cache where it holds the answer.

    Raises:
        InputError: the plan is for several types of GPU.
        PlanMismatchError: the model is no longer the plan's.
        InfeasibleError: nothing fits on so many.
    """
    if plan.cluster.description is not None:
        raise InputError("a cluster of several types of GPU has changed: plan again, with another --cluster")
    say = say or say_nothing
    count = plan.decisions.num_microbatches
    failure: AutoparError | None = None
    for pins, use_all in _attempts(plan):
        request = replace(
            request_of(plan, pins),
            num_gpus=num_gpus,
            use_all=use_all,
            with_baselines=False,
            time_limit_s=REPLAN_LIMIT_S,
        )
        try:
            found = parse_plan(finished_plan(Command(plan.model.source, plan.model.options, request)).plan_text)
        except PlanMismatchError:
            raise
        except (InfeasibleError, InputError) as error:
            failure = error if failure is None or isinstance(failure, InputError) else failure
            continue
        check_unchanged(plan, found.model.graph_hash)
        dropped = [name for name in plan.pinned or () if name not in (found.pinned or ())]
        if dropped:
            say(f"no plan for {counted(num_gpus)} keeps all that was pinned; now free: {', '.join(dropped)}")
        if found.decisions.num_microbatches != count:
            say(f"no plan for {num_gpus} devices has {count} microbatches: batch norms see others now")
        say(f"planned again for {counted(num_gpus)}: {describe(found.decisions)}")
        return found
    assert failure is not None
    raise failure


def _attempts(plan: Plan) -> list[tuple[Pins, bool]]:
    """Pins and whether all devices are used, in the order of what should be kept; each once.

    What the plan was pinned to comes first, then the same in another shape, then what it offloads alone.
    """
    count, own, free = plan.decisions.num_microbatches, made_under(plan), offload_pins(plan)
    kept = replace(own, offload_optimizer=free.offload_optimizer, offload_activations=free.offload_activations)
    loose = replace(kept, **SHAPE)
    same = [(replace(pins, num_microbatches=count), True) for pins in (kept, loose)]
    every = [
        *same,
        (loose, True),
        (loose, False),
        (replace(free, num_microbatches=count), True),
        (free, True),
        (free, False),
    ]
    return list(dict.fromkeys(every))


def plan_for_world(plan: Plan, say: Say | None = None) -> Plan:
    """The plan for as many processes as there are; every rank must call, and the first one plans.

    Raises:
        InputError: there is none, or the model has changed.
    """
    import torch.distributed as dist

    from autopar.runtime.agree import decided_by_first

    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == plan.decisions.num_gpus:
        return plan

    def decide() -> tuple[str, str]:
        try:
            return dump_plan(plan_again(plan, world, say)), ""
        except (InputError, InfeasibleError) as error:
            return "", str(error)

    text, fault = decided_by_first(decide)
    if fault:
        raise InputError(f"the plan is for {counted(plan.decisions.num_gpus)}, and for {world}: {fault}")
    return parse_plan(text)


def counted(count: int) -> str:
    """`1 process`, `3 processes`."""
    return "1 process" if count == 1 else f"{count} processes"
