"""The one place for torch APIs that are private or undocumented, each with what it is used for.

| function            | uses                                       | why nothing public serves                      |
|---------------------|--------------------------------------------|------------------------------------------------|
| `storage_key`       | `UntypedStorage._cdata`                    | meta tensors have no `data_ptr` to compare     |
| `op_overload`       | `torch.ops.<ns>.<name>.<overload>`         | public by use; the name parsing is ours        |
| `written_arguments` | `OpOverload._schema`                       | no public road to alias annotations            |
| `is_random`         | `OpOverload.tags`, `torch.Tag`             |                                                |
| `tree_*`            | `torch.utils._pytree`                      | no public pytree module in torch 2.13          |
| `is_op_overload`    | `torch._ops`                               | classes of fx node targets                     |
| `custom_gradients*` | `Function.apply`, `Tensor.register_hook`   | replaced while exporting, to see their use     |
| `Faker`             | `FakeTensorMode`                           | documented, but lives in a private module      |
| `strided_shard`     | `placement_types._StridedShard`            | DTensor's word for slicing a slice outside in  |
| `intercept`         | `TorchDispatchMode`                        | documented, but lives in a private module      |
| `allocation_events` | event tree of the profiler                 | public events carry no addresses               |
| `collective_name`   | `Work._get_op_type`                        | a `Work` says its name nowhere else            |
| `Store` and kinds   | `torch._C._distributed_c10d`               | documented, but has types in no public module  |
| `StorageWatch`      | `reductions.StorageWeakRef`                | storages take no other weak reference          |
| `version_of`        | `Tensor._version`                          | no other sign of a change in place             |
| `limit_collectives` | `distributed_c10d.default_pg_*timeout`     | groups of a mesh take no timeout of their own  |

`encode_constant` and `decode_constant` turn the torch constants of a call into the strings of `ir.graph.Arg` and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import torch
from torch._C import _distributed_c10d as c10d
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = {str(layout).removeprefix("torch."): layout for layout in (torch.strided,)}
Store: TypeAlias = c10d.Store
PrefixStore: TypeAlias = c10d.PrefixStore
TCPStore: TypeAlias = c10d.TCPStore
INPUT_DEVICE = "device:input"
"""Stands for the device on which the graph runs."""


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage, equal for views of one tensor; valid while the storage lives."""
    return int(tensor.untyped_storage()._cdata)


class StorageWatch:
    """Tells whether a storage still lives, without keeping it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        reference: Any = StorageWeakRef
        self._reference = reference(storage)

    def is_gone(self) -> bool:
        return bool(self._reference.expired())


def version_of(tensor: torch.Tensor) -> int:
    """How often its memory was changed in place, as autograd counts."""
    return int(tensor._version)


def target_name(overload: Any) -> str:
    """`aten.linear.default` for `torch.ops.aten.linear.default`."""
    return str(overload)


def op_overload(target: str) -> Any:
    """Inverse of `target_name`. Raises AttributeError for a name that torch does not know."""
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def written_arguments(overload: Any) -> tuple[int | str, ...]:
    """Arguments that the schema says are written: positions, or names for keyword-only ones."""
    found: list[int | str] = []
    for index, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(argument.name if argument.kwarg_only else index)
    return tuple(found)


def argument_names(overload: Any) -> tuple[str, ...]:
    """Names of all arguments in schema order."""
    return tuple(argument.name for argument in overload._schema.arguments)


def is_random(overload: Any) -> bool:
    """The op draws random numbers."""
    return torch.Tag.nondeterministic_seeded in overload.tags


def functional_overload(overload: Any) -> Any:
    """Out-of-place form of an in-place op, e.g. `relu.default` for `relu_.default`, or None."""
    namespace, name, variant = target_name(overload).split(".")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if not name.endswith("_") or packet is None:
        return None
    if variant in packet.overloads():
        return getattr(packet, variant)
    wanted = [str(argument.type) for argument in overload._schema.arguments]
    for candidate in sorted(packet.overloads()):
        found = getattr(packet, candidate)
        if [str(argument.type) for argument in found._schema.arguments] == wanted:
            return found
    return None


def encode_constant(value: object) -> bool | int | float | str | None:
    """Constant of a call as an `ir.graph.Arg`. Raises TypeError for what no call should hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return f"dtype:{str(value).removeprefix('torch.')}"
    if isinstance(value, torch.device):
        return INPUT_DEVICE
    if isinstance(value, torch.memory_format):
        return f"memory_format:{str(value).removeprefix('torch.')}"
    if isinstance(value, torch.layout):
        return f"layout:{str(value).removeprefix('torch.')}"
    raise TypeError(f"a constant of type {type(value).__name__}")


def decode_constant(value: object, device: torch.device | str) -> object:
    """Inverse of `encode_constant`; `device` is where the graph runs."""
    if not isinstance(value, str):
        return value
    if value == INPUT_DEVICE:
        return torch.device(device)
    kind, _, name = value.partition(":")
    return getattr(torch, name) if kind in ("dtype", "memory_format", "layout") and name else value


def dtype_of(name: str) -> torch.dtype:
    """`torch.float32` for `float32`."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"not a dtype: {name}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def call(target: str, args: Sequence[object], kwargs: dict[str, object]) -> Any:
    """Run one op whose constants are already decoded."""
    return op_overload(target)(*args, **kwargs)


def tree_leaves(tree: Any) -> list[Any]:
    """Leaves of nested tuples, lists and dicts, in the order that `torch.export` uses."""
    return list(pytree.tree_leaves(tree))


def tree_leaves_with_keys(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with a readable path such as `0`, `input_ids` or `0.x`."""
    found, _ = pytree.tree_flatten_with_path(tree)
    return [(".".join(_key(part) for part in path), leaf) for path, leaf in found]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` on every leaf, structure kept."""
    return pytree.tree_map(function, tree)


def tree_structure(tree: Any) -> Any:
    """Nesting, keys and types without the leaves; comparable with `==`."""
    return pytree.tree_structure(tree)


def _key(part: Any) -> str:
    return str(next(getattr(part, name) for name in ("key", "idx", "name") if hasattr(part, name)))


def is_op_overload(target: object) -> bool:
    """A single torch operator, as opposed to a higher-order operator or a Python function."""
    return isinstance(target, torch._ops.OpOverload)


def higher_order_name(target: object) -> str:
    """Name of a higher-order operator such as `wrap_with_set_grad_enabled`, else the empty string."""
    return str(target).rpartition(".")[2] if isinstance(target, torch._ops.HigherOrderOperator) else ""


def op_name(overload: Any) -> str:
    """`linear` for `torch.ops.aten.linear.default`."""
    return target_name(overload).split(".")[1]


_DispatchMode: Any = TorchDispatchMode


class _Intercept(_DispatchMode):  # type: ignore[misc]
    def __init__(self, handle: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self._handle = handle

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._handle(func, args, kwargs or {})


def intercept(handle: Callable[[Any, Any, Any], Any]) -> AbstractContextManager[Any]:
    """Within the context, `handle(overload, args, kwargs)` stands in for every op below autograd."""
    found: AbstractContextManager[Any] = _Intercept(handle)
    return found


def strided_shard(dim: int, split_factor: int) -> Any:
    """DTensor placement of a slice taken after inner axes have split the same dim `split_factor` ways."""
    from torch.distributed.tensor.placement_types import _StridedShard  # costs a second that capture need not pay

    return _StridedShard(dim, split_factor=split_factor)


def allocation_profiler() -> torch.profiler.profile:
    """Records what this thread takes from torch's CPU allocator and gives back."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def allocation_events(profiler: torch.profiler.profile) -> list[tuple[int, int]]:
    """(address, bytes) of everything that torch's CPU allocator handed out, and took back (negative bytes), in order.

    The profiler is an `allocation_profiler` that is over.
    """
    from torch._C._profiler import _EventType

    found: list[tuple[int, int, int]] = []
    events = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while events:
        event = events.pop()
        events += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda row: row[0])]


COLLECTIVES = {
    0: "broadcast", 1: "all_reduce", 3: "reduce", 4: "all_gather", 5: "all_gather", 7: "gather", 8: "scatter",
    9: "reduce_scatter", 10: "all_to_all", 11: "all_to_all", 12: "send", 13: "recv", 14: "recv", 15: "barrier",
    16: "reduce_scatter", 17: "batch_isend_irecv",
}  # fmt: skip
"""`c10d::OpType` -> function of `torch.distributed`."""


def collective_name(work: Any) -> str:
    """Name of the collective that a `torch.distributed.Work` stands for; `a collective` for kinds that have none."""
    return COLLECTIVES.get(int(work._get_op_type()), "a collective")


def connect_again(store: c10d.Store) -> c10d.Store:
    """Another connection to the same store, for another thread."""
    found: c10d.Store = store.clone()  # type: ignore[attr-defined]  # missing in the types of torch
    return found


def limit_collectives(timeout: timedelta) -> None:
    """Give every process group made from now on this timeout, also for sends and receives."""
    from torch.distributed import distributed_c10d

    setattr(distributed_c10d, "default_pg_timeout", timeout)  # noqa: B010
    setattr(distributed_c10d, "default_pg_nccl_timeout", timeout)  # noqa: B010


class Faker:
    """Makes fake CPU tensors: shape, strides, dtype and device without memory, one for each tensor given."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._made: dict[int, torch.Tensor] = {}

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._made:
            with self._mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
            self._made[id(tensor)] = made
        return self._made[id(tensor)]


REFUSED_TORCH_FUNCTIONS = ("CheckpointFunction", "BackwardHookFunction")


@contextmanager
def custom_gradients_reported(report: Callable[[str], None]) -> Iterator[None]:
    """Within the context, call `report` with a name when user code runs an `autograd.Function` or hooks a tensor.

    Export records what such code computes forward but not the gradient that it defines. torch's own functions pass,
    except re-entrant checkpoints and module backward hooks, which hide gradients in the same way.
    """
    apply: Any = torch.autograd.Function.__dict__["apply"]
    register_hook: Any = torch.Tensor.register_hook

    def reporting_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch.") or cls.__name__ in REFUSED_TORCH_FUNCTIONS:
            report(f"autograd.Function {cls.__name__}")
        return apply.__get__(None, cls)(*args, **kwargs)

    def reporting_hook(tensor: torch.Tensor, hook: Callable[..., Any]) -> Any:
        report("Tensor.register_hook")
        return register_hook(tensor, hook)

    setattr(torch.autograd.Function, "apply", classmethod(reporting_apply))  # noqa: B010
    setattr(torch.Tensor, "register_hook", reporting_hook)  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.autograd.Function, "apply", apply)  # noqa: B010
        setattr(torch.Tensor, "register_hook", register_hook)  # noqa: B010
