"""Mesh: a logical n-d view of devices with named axes.

Ranks are row-major over the axes, outermost first: the innermost axis has stride 1 and so stays inside a node.
The pipeline axis `pp`, when present, is outermost; the axes inside one stage are its `stage_axes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """A named axis; `size` >= 1."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.size < 1 or not self.name.isidentifier():
            raise ValueError(f"not a mesh axis: {self.name!r} of size {self.size}")


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of one collective: `size` members, `stride` ranks apart."""

    size: int
    stride: int

    def members_per_node(self, gpus_per_node: int) -> int:
        """Members that share a node with one another (>= 1)."""
        return max(1, min(self.size, gpus_per_node // self.stride))


@dataclass(frozen=True, slots=True)
class StageMesh:
    """The axes that the devices of one stage form, e.g. (dp=4, tp=2). Those of other stages differ in size at most."""

    axes: tuple[MeshAxis, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes)

    def group(self, axis_index: int) -> Group:
        """Collective group along one axis."""
        return Group(self.sizes[axis_index], math.prod(self.sizes[axis_index + 1 :]))

    def coordinate(self, rank_in_stage: int) -> tuple[int, ...]:
        """Position on each axis of a rank counted from the stage's first rank."""
        position = []
        for size in reversed(self.sizes):
            rank_in_stage, remainder = divmod(rank_in_stage, size)
            position.append(remainder)
        return tuple(reversed(position))


AXES: Mapping[int, tuple[str, ...]] = MappingProxyType({4: ("dp", "ep", "cp", "tp")})
"""Names of a stage's axes by their number: data (samples), experts, context (positions) and tensor parallelism."""


def axis_names(num_axes: int) -> tuple[str, ...]:
    """(dp), (dp, tp) or (dp, ep, cp, tp); of other numbers dp, tp, x2, x3, ..."""
    others = ("dp", "tp", *(f"x{i}" for i in range(2, num_axes)))
    return AXES.get(num_axes, others[:num_axes])


def stage_mesh(*sizes: int) -> StageMesh:
    """`stage_mesh(4, 2)` is (dp=4, tp=2); `stage_mesh(8)` is (dp=8)."""
    return StageMesh(tuple(map(MeshAxis, axis_names(len(sizes)), sizes)))
