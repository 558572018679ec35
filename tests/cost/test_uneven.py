"""Prices of stages with meshes of their own, against those of equal stages on the same meshes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost.predict import plan_costs, predict
from autopar.cost.table import CostTables
from autopar.errors import PlanMismatchError
from autopar.ir.mesh import StageMesh, stage_mesh
from autopar.ir.solution import Decisions, Objective, Pins
from autopar.rules.stage_meshes import joined
from autopar.search.solve import search
from tests.cost.devices import plain_cluster
from tests.toy_graphs import residual_graph

GRAPH = residual_graph(layers=4)
COUNT = 2


def tables() -> CostTables:
    return CostTables(GRAPH, plain_cluster(), pins=Pins(roles=True))


def best_on(source: CostTables, mesh: StageMesh) -> Decisions:
    """The best pipeline of two stages on one mesh."""
    dp, tp = mesh.sizes
    pins = Pins(dp=dp, tp=tp, pp=2, num_microbatches=COUNT, roles=True)
    return search(source, Objective("time"), pins=pins, use_all=False).decisions


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)])
def test_equal_meshes_cost_what_one_mesh_costs(sizes: tuple[int, int]) -> None:
    source = tables()
    alike = best_on(source, stage_mesh(*sizes))
    own = joined(GRAPH, [alike, alike], alike.stages)
    one, other = predict(source, alike), predict(source, own)
    for name in ("step_time_s", "energy_j", "peak_power_w"):
        assert getattr(other, name).value == pytest.approx(getattr(one, name).value, rel=1e-12), name
    assert other.stages == one.stages
    assert own.num_gpus == alike.num_gpus
    assert [own.place_of(gpu) for gpu in (0, own.num_gpus - 1)] == [(0, 0), (1, alike.mesh.num_devices - 1)]


def test_each_stage_costs_what_it_costs_on_its_mesh() -> None:
    source = tables()
    plans = [best_on(source, stage_mesh(2, 1)), best_on(source, stage_mesh(1, 2))]
    stages = plans[0].stages
    own = joined(GRAPH, plans, stages)
    found, _ = plan_costs(source, own)
    for k, plan in enumerate(plans):
        alone, _ = plan_costs(source, replace(plan, stages=stages))
        assert found[k].times == alone[k].times
        assert (found[k].state, found[k].activation_bytes) == (alone[k].state, alone[k].activation_bytes)
    assert found[0].wire is None
    (name,) = [n for n in own.hubs if n in own.hubs and GRAPH.producers()[n].block == stages[0].stop - 1]
    size = GRAPH.values[name].meta.num_bytes / COUNT
    wire = found[1].wire
    assert wire is not None
    assert (wire.busiest_bytes, wire.total_bytes) == expected_wire(own, name, size)
    energy = predict(source, own).energy_by_cause["dynamic"]
    each = sum(m.num_devices * (COUNT * c.microbatch_j + c.step_j) for m, c in zip(own.meshes, found, strict=True))
    assert energy >= each


def expected_wire(own: Decisions, name: str, size: float) -> tuple[float, float]:
    """By hand: halves of samples go to receivers that hold all of it, or half of another dim."""
    on_tensor = own.hubs[name][1]
    if on_tensor.is_shard:
        return size / 2, 2 * size
    return size, 3 * size


def test_a_choice_that_a_mesh_does_not_have_is_told() -> None:
    source = tables()
    plans = [best_on(source, stage_mesh(2, 1)), best_on(source, stage_mesh(1, 2))]
    own = joined(GRAPH, plans, plans[0].stages)
    swapped = replace(own, stage_meshes=own.stage_meshes[::-1], mesh=own.stage_meshes[1])
    with pytest.raises(PlanMismatchError):
        predict(source, swapped)
