"""ParameterStore: the parameters of one stage on one rank, as compute and as the optimizer see them.

Each parameter has one *leaf*, a plain local tensor in its storage placement, which the program reads and into which
autograd accumulates the gradients of all microbatches, and one *boundary* parameter, a DTensor for `torch.optim`,
clipping and checkpoints. Both share memory: the boundary's local tensor is the leaf or, for zero1, this rank's part
of it, after whose update the leaf is gathered again. With a `master` dtype, leaves of a narrower one have a boundary of
their own in it, from which they are cast after the update; their gradients are then added up in the master's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement

from autopar.errors import RewriteError
from autopar.ir.graph import Value
from autopar.ir.placement import REPLICATE
from autopar.ir.strategy import ParameterStrategy, optimizer_sharding
from autopar.program.collectives import all_gather_dim, slice_dim
from autopar.program.flat import in_groups
from autopar.runtime.buckets import (
    BUCKET_BYTES,
    SCATTER,
    SLICE,
    SUM,
    Bucket,
    Member,
    Overlap,
    Reduction,
    gather_together,
    make_buckets,
)
from autopar.runtime.early import Early
from autopar.runtime.mesh import RankMesh
from autopar.runtime.resharding import sum_over_stages
from autopar.torch_adapter import strided_shard

Cut = tuple[int, int]
"""(mesh axis, tensor dim) of one slicing."""


@dataclass(frozen=True)
class StoredParameter:
    """One parameter of one rank.

    Attributes:
        value: its graph value.
        strategy: by mesh axis.
        leaf: what the program reads.
        updated: what the optimizer updates: the rank's own part, as a plain tensor.
        boundary: the same memory as the world sees it: a DTensor on a mesh, else `updated` itself.
        tied: stages that share it, if more than one.
    """

    value: Value
    strategy: ParameterStrategy
    leaf: Tensor
    updated: nn.Parameter
    boundary: nn.Parameter
    tied: tuple[int, ...]

    @property
    def storage_cuts(self) -> tuple[Cut, ...]:
        return tuple((i, axis.storage.dim) for i, axis in enumerate(self.strategy) if axis.storage.is_shard)

    @property
    def optimizer_cuts(self) -> tuple[Cut, ...]:
        """Further slicing of the leaf, outermost axis first."""
        return _optimizer_cuts(self.strategy)


def _optimizer_cuts(strategy: ParameterStrategy) -> tuple[Cut, ...]:
    return tuple(
        (i, axis.optimizer.dim)
        for i, axis in enumerate(strategy)
        if axis.optimizer.is_shard and not axis.storage.is_shard
    )


class ParameterStore:
    """All parameters of one stage; see the module docstring."""

    def __init__(
        self,
        values: Sequence[Value],
        strategies: Mapping[str, ParameterStrategy],
        whole: Mapping[str, Tensor],
        *,
        mesh: RankMesh,
        tied: Mapping[str, tuple[int, ...]],
        device: str,
        bucket_bytes: float = BUCKET_BYTES,
        master: torch.dtype | None = None,
    ) -> None:
        """Slice this rank's part of every parameter.

        Args:
            values: parameters that the stage reads.
            strategies: of every parameter of the graph, by value name.
            whole: full tensors by value name, on any device; equal on all ranks. They are not kept.
            mesh: this rank's groups.
            tied: stages that read a parameter, for parameters read by several.
            device: of the run; only this rank's parts are moved there.
            bucket_bytes: of parameters that share a collective, at most.
            master: dtype of what the optimizer updates where the parameter's own is narrower; None: the parameter's.
        """
        self._mesh = mesh
        self._master = master
        self.device = device
        self.items: dict[str, StoredParameter] = {}
        for value in values:
            strategy = strategies[value.name]
            self.items[value.name] = self._store(value, strategy, whole[value.name], tied.get(value.name, ()))
        self._buckets = self._make_buckets(bucket_bytes, early=False)
        self._early = Early(self._make_buckets(bucket_bytes, early=True))
        self._cut_groups = in_groups(
            [item for item in self.items.values() if self._cuts(item)],
            lambda item: (item.leaf.dtype, tuple(axis for axis, _ in self._cuts(item))),
            lambda item: item.leaf,
            bucket_bytes,
        )
        self._overlap: Overlap | None = None

    def _store(
        self, value: Value, strategy: ParameterStrategy, whole: Tensor, tied: tuple[int, ...]
    ) -> StoredParameter:
        local = whole.detach()
        for i, axis in enumerate(strategy):
            if axis.storage.is_shard:
                local = slice_dim(local, self._mesh.axes[i], axis.storage.dim)
        leaf = local.clone(memory_format=torch.contiguous_format).to(self.device)
        shard = leaf
        for i, dim in _optimizer_cuts(strategy):
            shard = slice_dim(shard, self._mesh.axes[i], dim)
        leaf.requires_grad_(value.requires_grad)
        if value.requires_grad and _is_narrower(leaf.dtype, self._master):
            shard = shard.detach().to(self._master)
            leaf.grad_dtype = self._master
        updated = nn.Parameter(shard.detach(), requires_grad=value.requires_grad)
        boundary = self._at_boundary(updated, strategy, whole)
        return StoredParameter(value, strategy, leaf, updated, boundary, tied)

    def _at_boundary(self, updated: nn.Parameter, strategy: ParameterStrategy, whole: Tensor) -> nn.Parameter:
        mesh = self._mesh.stage_mesh
        if mesh is None:
            return updated
        made = DTensor.from_local(
            updated.detach(),
            mesh,
            boundary_placements(strategy, tuple(axis.size for axis in self._mesh.axes)),
            run_check=False,
            shape=whole.shape,
            stride=whole.contiguous().stride(),
        )
        return nn.Parameter(made, requires_grad=updated.requires_grad)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What the program reads, by value name."""
        return {name: item.leaf for name, item in self.items.items()}

    def boundary_parameters(self) -> list[nn.Parameter]:
        """Parameters for the user, frozen ones left out."""
        return [item.boundary for item in self.items.values() if item.value.requires_grad]

    def updated_parameters(self) -> list[nn.Parameter]:
        """Plain tensors over the memory of `boundary_parameters`, in the same order: no dispatch in the optimizer."""
        return [item.updated for item in self.items.values() if item.value.requires_grad]

    def complete_leaves(self) -> frozenset[int]:
        """Ids of the leaves to whose gradients nothing is done after backward."""
        items = self.items.values()
        return frozenset(id(item.leaf) for item in items if not item.tied and not self._reductions(item))

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step."""
        for item in self.items.values():
            item.leaf.grad = item.updated.grad = item.boundary.grad = None
        if self._overlap is not None:
            self._overlap.begin()
        self._early.begin()

    def sum_early(self, uses: Mapping[str, int]) -> None:
        """From now on cut the gradients of zero2 parameters while microbatches run.

        Args:
            uses: by value name, how many backwards of a microbatch add to each gradient.
        """
        self._early.watch(uses)

    def overlap(self, uses: Mapping[str, int]) -> None:
        """From now on start summing gradients while backward runs.

        Args:
            uses: by value name, how many backwards of a step add to each gradient.
        """
        self._overlap = Overlap(self._buckets, uses)

    def sync_gradients(self) -> None:
        """After the last microbatch: finish the pending sums and hand every gradient to what the optimizer updates.

        The leaf's own gradient is given up, so that a gradient that is split ends with its part alone in memory.
        Collectives run in the same order on every rank. A parameter without gradient keeps none.
        """
        for name, gradient in self._early.finish():
            self._hand_over(self.items[name], gradient)
        for bucket in self._buckets:
            if not bucket.is_started:
                bucket.start()
        for bucket in self._buckets:
            for name, gradient in bucket.finish():
                self._hand_over(self.items[name], gradient)
        for item in self.items.values():
            if item.tied and item.value.requires_grad:
                self._hand_over(item, self._tied_gradient(item))
            elif item.leaf.grad is not None:
                self._hand_over(item, item.leaf.grad.contiguous())

    @contextmanager
    def complete(self, names: Iterable[str]) -> Iterator[None]:
        """Run an update of some parameters before the step ends: of those whose gradients backward leaves complete."""
        items = [self.items[name] for name in names]
        for item in items:
            if item.leaf.grad is not None:
                self._hand_over(item, item.leaf.grad.contiguous())
        yield
        with torch.no_grad():
            for item in items:
                item.updated.grad = None
                if item.updated.dtype != item.leaf.dtype:
                    item.leaf.copy_(item.updated)

    def _hand_over(self, item: StoredParameter, gradient: Tensor) -> None:
        item.leaf.grad = None
        item.updated.grad = gradient

    def expose_gradients(self) -> None:
        """After `sync_gradients`: let boundary parameters have the gradients too, in the same memory."""
        for item in self.items.values():
            if item.updated.grad is not None and item.boundary is not item.updated:
                item.boundary.grad = self._at_boundary_like(item, item.updated.grad)

    def take_gradients(self) -> None:
        """Before the update: take the gradients that the user has put at boundary parameters."""
        for item in self.items.values():
            if item.boundary.grad is not None and item.boundary is not item.updated:
                item.updated.grad = local_of(item.boundary.grad)

    def _tied_gradient(self, item: StoredParameter) -> Tensor:
        """The sum over the pipeline ranks that share the parameter; a rank may have no term of it."""
        gradient = item.leaf.grad
        gradient = torch.zeros_like(item.leaf, dtype=item.updated.dtype) if gradient is None else gradient.contiguous()
        alone = Bucket((Member(item.value.name, item.leaf, self._reductions(item)),), self._mesh.axes)
        item.leaf.grad = gradient
        alone.start()
        ((_, gradient),) = alone.finish()
        if self._mesh.meshes:
            sharding = optimizer_sharding(item.strategy)
            return sum_over_stages(self._mesh, tuple(item.value.meta.shape), sharding, item.tied, gradient)
        dist.all_reduce(gradient, group=self._mesh.tied[item.tied])
        return gradient

    def _reductions(self, item: StoredParameter) -> tuple[Reduction, ...]:
        """What the gradient that backward leaves still needs, axis by axis."""
        found = []
        for i, axis in enumerate(item.strategy):
            is_pending = axis.exposed == REPLICATE and not axis.storage.is_shard and self._mesh.axes[i].size > 1
            if axis.optimizer.is_shard and not axis.storage.is_shard and self._mesh.axes[i].size > 1:
                found.append(Reduction(i, SCATTER if is_pending else SLICE, axis.optimizer.dim))
            elif is_pending:
                found.append(Reduction(i, SUM))
        return tuple(found)

    def _make_buckets(self, limit_bytes: float, *, early: bool) -> tuple[Bucket, ...]:
        members = [
            Member(name, item.leaf, reductions)
            for name, item in self.items.items()
            if item.value.requires_grad and not item.tied and (reductions := self._reductions(item))
            if any(axis.label == "zero2" for axis in item.strategy) == early
        ]
        return make_buckets(members, self._mesh.axes, limit_bytes)

    def _at_boundary_like(self, item: StoredParameter, local: Tensor) -> Tensor:
        if not isinstance(item.boundary, DTensor):
            return local
        spec = item.boundary
        return DTensor.from_local(
            local, spec.device_mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride()
        )

    def after_update(self) -> None:
        """After the optimizer: cast masters, gather the parts that zero1 ranks updated. Once a step on every rank."""
        for item in self.items.values():
            if not self._cuts(item):
                self.settle(item)
        self.gather_parts({})

    def settle(self, item: StoredParameter) -> dict[str, Tensor]:
        """After the update of one parameter: cast its master; by name, its part if others have the rest of the leaf."""
        with torch.no_grad():
            if self._cuts(item):
                return {item.value.name: item.updated.detach().to(item.leaf.dtype)}
            if item.updated.dtype != item.leaf.dtype:
                item.leaf.copy_(item.updated)
        return {}

    def gather_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Gather what zero1 ranks updated; every rank must call. `parts` are those that `settle` gave, if any."""
        with torch.no_grad():
            for group in self._cut_groups:
                own = [parts.get(item.value.name, item.updated.detach()).to(item.leaf.dtype) for item in group]
                leaves = [item.leaf for item in group]
                gather_together(own, [self._cuts(item) for item in group], leaves, self._mesh.axes)

    def _cuts(self, item: StoredParameter) -> tuple[Cut, ...]:
        """Slicings of the leaf that leave something out."""
        return tuple((i, dim) for i, dim in item.optimizer_cuts if self._mesh.axes[i].size > 1)

    def _joined(self, part: Tensor, cuts: Iterable[Cut]) -> Tensor:
        for i, dim in reversed(tuple(cuts)):
            part = all_gather_dim(part, self._mesh.axes[i], dim)
        return part

    def whole_parameter(self, name: str) -> Tensor:
        """The full parameter, gathered over the stage's ranks, which must all call."""
        item = self.items[name]
        return self._joined(item.leaf.detach(), item.storage_cuts)

    def whole_gradient(self, name: str) -> Tensor | None:
        """The full gradient after `sync_gradients`, or None where there is none; all ranks of the stage must call."""
        item = self.items[name]
        if item.updated.grad is None:
            return None
        return self._joined(item.updated.grad, (*item.storage_cuts, *item.optimizer_cuts))

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared norm of all gradients: the sum over all ranks of the run is the whole.

        A part that several ranks hold is counted by the first of them, and a tied parameter by its first stage.
        """
        total = torch.zeros((), dtype=torch.float64)
        for item in self.items.values():
            if item.updated.grad is not None and self._counts(item):
                total += item.updated.grad.double().square().sum().cpu()
        return total

    def _counts(self, item: StoredParameter) -> bool:
        if item.tied and item.tied[0] != self._mesh.stage:
            return False
        pairs = zip(self._mesh.axes, item.strategy, strict=True)
        return all(strategy.optimizer.is_shard or axis.index == 0 for axis, strategy in pairs)


def _is_narrower(dtype: torch.dtype, master: torch.dtype | None) -> bool:
    return master is not None and dtype.is_floating_point and dtype.itemsize < master.itemsize


def local_of(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def boundary_placements(strategy: ParameterStrategy, sizes: Sequence[int]) -> tuple[TorchPlacement, ...]:
    """Optimizer placements in DTensor's words.

    A zero1 axis slices what inner axes have already sliced in storage; DTensor calls that order a strided shard.
    """
    found: list[TorchPlacement] = []
    for i, axis in enumerate(strategy):
        if axis.optimizer.kind == "S":
            inside = [b.storage == axis.optimizer for b in strategy[i + 1 :]]
            factor = 1
            for is_inside, size in zip(inside, sizes[i + 1 :], strict=True):
                factor *= size if is_inside else 1
            is_late = not axis.storage.is_shard and factor > 1
            found.append(strided_shard(axis.optimizer.dim, factor) if is_late else Shard(axis.optimizer.dim))
        elif axis.optimizer.holds_whole_value:
            found.append(Replicate())
        else:
            raise RewriteError(f"a parameter cannot be stored as {axis.optimizer}")
    return tuple(found)


def tied_stages(parameters_by_stage: Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """Stages that read a parameter, for each parameter read by more than one."""
    readers: dict[str, list[int]] = {}
    for stage, names in enumerate(parameters_by_stage):
        for name in names:
            readers.setdefault(name, []).append(stage)
    return {name: tuple(stages) for name, stages in readers.items() if len(stages) > 1}
