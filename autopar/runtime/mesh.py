"""RankMesh: the process groups of one rank of a plan.

Ranks are `stage * devices_per_stage + rank_in_stage`: the pipeline axis is outermost. In an interleaved pipeline
`stage` is the pipeline rank here, and its chunks of the model are `stage`, `stage + num_stages`, ...
Where stages have meshes of their own, those of a stage follow the ranks of the stage before.
`torch.distributed` must be initialised with exactly that many ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
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
        pipeline: group of the ranks at this coordinate in all stages, of this rank alone where stages have meshes of
            their own; None with one stage.
        tied: groups of the ranks at this coordinate in some stages, of all their ranks where stages have meshes of
            their own, by those stages.
        meshes: of every stage, where they differ.
    """

    stage: int
    num_stages: int
    coordinate: tuple[int, ...]
    axes: tuple[AxisGroup, ...]
    stage_mesh: DeviceMesh | None
    pipeline: dist.ProcessGroup | None
    tied: Mapping[tuple[int, ...], dist.ProcessGroup]
    meshes: tuple[StageMesh, ...] = ()

    @property
    def rank_in_stage(self) -> int:
        """Place among the ranks of the stage."""
        found = 0
        for axis in self.axes:
            found = found * axis.size + axis.index
        return found

    def first_rank(self, stage: int) -> int:
        """Of a stage, where stages have meshes of their own."""
        return sum(mesh.num_devices for mesh in self.meshes[:stage])

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


def join_meshes(meshes: Sequence[StageMesh], device_type: str, tied_stages: Iterable[tuple[int, ...]] = ()) -> RankMesh:
    """As `join_mesh`, for stages with meshes of their own.

    Raises:
        InputError: if the world has another number of ranks.
    """
    bounds = [0, *itertools.accumulate(mesh.num_devices for mesh in meshes)]
    rank = dist.get_rank()
    if dist.get_world_size() != bounds[-1]:
        raise InputError(f"the plan needs {bounds[-1]} processes, found {dist.get_world_size()}")
    stage = next(k for k, stop in enumerate(bounds[1:]) if rank < stop)
    every = [
        DeviceMesh(
            device_type, torch.arange(*span).reshape(mesh.sizes), mesh_dim_names=tuple(a.name for a in mesh.axes)
        )
        for mesh, span in zip(meshes, itertools.pairwise(bounds), strict=True)
    ]
    alone = [dist.new_group([r]) for r in range(bounds[-1])]
    coordinate = meshes[stage].coordinate(rank - bounds[stage])
    axes = tuple(
        AxisGroup(axis.name, axis.size, index, every[stage].get_group(axis.name))
        for axis, index in zip(meshes[stage].axes, coordinate, strict=True)
    )
    return RankMesh(
        stage=stage,
        num_stages=len(meshes),
        coordinate=coordinate,
        axes=axes,
        stage_mesh=every[stage],
        pipeline=alone[rank],
        tied=_joint_groups(bounds, {*tied_stages, *itertools.pairwise(range(len(meshes)))}, stage, device_type),
        meshes=tuple(meshes),
    )


def _joint_groups(
    bounds: Sequence[int], sets: Iterable[tuple[int, ...]], stage: int, device_type: str
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """A group of all ranks of each set of stages; its first collective is over here, so that few may use it later."""
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for stages in sorted(sets):
        group = dist.new_group([rank for k in stages for rank in range(bounds[k], bounds[k + 1])])
        if stage in stages and group is not None:
            dist.all_reduce(torch.zeros(1, device=device_type), group=group)
            found[stages] = group
    return found
