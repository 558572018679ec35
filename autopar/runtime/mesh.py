"""RankMesh: the process groups of one rank of a plan.

Ranks are `stage * devices_per_stage + rank_in_stage`: the pipeline axis is outermost. In an interleaved pipeline
`stage` is the pipeline rank here, and its chunks of the model are `stage`, `stage + num_stages`, ...
`torch.distributed` must be initialised with exactly that many ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.errors import InputError
from autopar.ir.mesh import StageMesh
from autopar.program.collectives import AxisGroup


@dataclass(frozen=True)
class RankMesh:
    """Where one rank stands and whom it talks to.

    Attributes:
        stage, num_stages: position in the pipeline.
        coordinate: position on the axes of the stage mesh.
        axes: groups of the stage axes.
        stage_mesh: the same as a DeviceMesh, for DTensors; None without stage axes.
        pipeline: group of the ranks at this coordinate in all stages; None with one stage.
        tied: groups of the ranks at this coordinate in some stages, by those stages.
    """

    stage: int
    num_stages: int
    coordinate: tuple[int, ...]
    axes: tuple[AxisGroup, ...]
    stage_mesh: DeviceMesh | None
    pipeline: dist.ProcessGroup | None
    tied: Mapping[tuple[int, ...], dist.ProcessGroup]

    @property
    def is_alone(self) -> bool:
        """The run has one process (there may be others in the world that run the same thing for themselves)."""
        return self.pipeline is None and not self.axes


def serial_mesh() -> RankMesh:
    """One process that talks to nobody."""
    return RankMesh(0, 1, (), (), None, None, {})


def join_mesh(
    mesh: StageMesh, num_stages: int, device_type: str, tied_stages: Iterable[tuple[int, ...]] = ()
) -> RankMesh:
    """Make the groups; every rank must call this with equal arguments.

    Args:
        mesh: of one stage.
        num_stages: length of the pipeline.
        device_type: `cpu` or `cuda`.
        tied_stages: sets of stages that share some parameter.

    Raises:
        InputError: if the world has another number of ranks.
    """
    expected = mesh.num_devices * num_stages
    if dist.get_world_size() != expected:
        raise InputError(f"the plan needs {expected} processes, found {dist.get_world_size()}")
    names = tuple(axis.name for axis in mesh.axes)
    whole = init_device_mesh(device_type, (num_stages, *mesh.sizes), mesh_dim_names=("pp", *names))
    stage, rank_in_stage = divmod(dist.get_rank(), mesh.num_devices)
    coordinate = mesh.coordinate(rank_in_stage)
    axes = tuple(
        AxisGroup(axis.name, axis.size, index, whole.get_group(axis.name))
        for axis, index in zip(mesh.axes, coordinate, strict=True)
    )
    return RankMesh(
        stage=stage,
        num_stages=num_stages,
        coordinate=coordinate,
        axes=axes,
        stage_mesh=whole[names] if names else None,
        pipeline=whole.get_group("pp") if num_stages > 1 else None,
        tied=_tied_groups(mesh, tied_stages, rank_in_stage),
    )


def _tied_groups(
    mesh: StageMesh, tied_stages: Iterable[tuple[int, ...]], rank_in_stage: int
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """One group per set of stages and coordinate; all ranks make all of them, and keep their own."""
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    pairs = itertools.product(sorted(set(tied_stages)), range(mesh.num_devices))
    for stages, position in pairs:
        group = dist.new_group([stage * mesh.num_devices + position for stage in stages])
        if position == rank_in_stage and group is not None:
            found[stages] = group
    return found
