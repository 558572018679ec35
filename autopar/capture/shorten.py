"""Export a model of which alike layers are traced three times per kind; the others leave one stand-in each.

The model's own code runs in full: each layer is called as the model calls it, at its place, so skip connections,
collected outputs and `len(self.layers)` come out as they are. What is not traced again is the inside of a layer, and
only where nothing can differ:

- the layers are alike (`capture.repeats`), also after the trace: a forward that changes its layer is refused;
- integers that number the layers are exchanged for objects while tracing: every use of one is refused;
- a layer is called once, with arguments of the same structure, shapes, strides, dtypes, gradients and shared memory,
  with equal constants, in the same mode of autograd and autocast, as the second of its kind;
- nobody looks into a layer that is not traced: its parameters and submodules are hidden, asking for them is refused;
- results are tensors in memory of their own or the arguments themselves.

`capture.expand` then compares the calls of the second and the last layer, and refuses unless they agree and touch
nothing but their arguments and their own parameters. What remains unseen is code that behaves differently by the
state of the outside world between the second and the last call.

First, second and last layer of each kind are traced; the first may differ (it may get other arguments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from autopar import torch_adapter
from autopar.capture import markers
from autopar.capture.repeats import Description, Place, Repeat, describe, describe_objects
from autopar.errors import CaptureError

OWN_FILE = __file__
"""As it stands in the frames of traced calls."""
Constant: TypeAlias = bool | int | float | str | torch.dtype | torch.device | None
"""Types of arguments and results that are no tensors and may be compared."""

Forward: TypeAlias = Callable[..., Any]


class RefusedError(CaptureError):
    """The layers cannot be shown to be alike; the model must be traced in full."""


@dataclass(frozen=True)
class Site:
    """One layer: `kind` counts the repeats; `is_traced` ones stand in full in the trace."""

    path: str
    kind: int
    is_traced: bool


@dataclass(frozen=True)
class Shortened:
    """What `capture.expand` needs: the sites by number, paths without the wrapper's prefix."""

    sites: tuple[Site, ...]

    def model_layer(self, kind: int) -> int:
        """Number of the second layer of a kind, which the stand-ins are copies of."""
        return [number for number, site in enumerate(self.sites) if site.kind == kind][1]

    def check_layer(self, kind: int) -> int:
        """Number of the last layer of a kind, which must agree with the model layer."""
        return [number for number, site in enumerate(self.sites) if site.kind == kind][-1]


def plan_sites(repeats: tuple[Repeat, ...]) -> Shortened:
    """Which layers are traced: the first two and the last of each kind."""
    return Shortened(
        tuple(
            Site(path, kind, index < 2 or index == len(repeat.paths) - 1)
            for kind, repeat in enumerate(repeats)
            for index, path in enumerate(repeat.paths)
        )
    )


@dataclass(frozen=True)
class _Reference:
    """The call of a kind's second layer: its signature, its results, and how to make others like them."""

    signature: object
    outputs: Any
    specs: str


@dataclass
class _Trace:
    """What happens while the shortened model is traced."""

    called: set[int] = field(default_factory=set)
    references: dict[int, _Reference] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_running: bool = False

    def refusal(self, problem: str) -> RefusedError:
        """The error to raise; remembered, in case that the model's code catches it."""
        self.problems.append(problem)
        return RefusedError(problem)


@contextmanager
def shortened(
    whole: torch.nn.Module, model: torch.nn.Module, repeats: tuple[Repeat, ...], sites: Shortened
) -> Iterator[None]:
    """Within the context the model is a shortened one.

    Args:
        whole: the module whose forward is traced; nothing but its code may look into hidden layers.
        model: where the sites' paths start.

    Raises:
        RefusedError: from the forward or at the end, if the layers cannot be shown to be alike.
    """
    before = _describe_all(model, sites)
    trace = _Trace()
    watched: list[tuple[torch.nn.Module, Place]] = []
    with ExitStack() as stack:
        for number, site in enumerate(sites.sites):
            layer = model.get_submodule(site.path)
            if site.is_traced:
                watched.extend((layer, place) for place in repeats[site.kind].numbers)
                stack.enter_context(_replaced(layer, "forward", _traced_forward(layer, number, sites, trace)))
            else:
                stack.enter_context(_hidden(layer, site.path, trace))
                stack.enter_context(_replaced(layer, "forward", _skipped_forward(number, sites, trace)))
        stack.enter_context(_replaced(whole, "forward", _running(whole.forward, watched, trace)))
        yield
    if trace.problems:
        raise RefusedError(trace.problems[0])
    if len(trace.called) != len(sites.sites):
        raise RefusedError("a repeated layer is not called")
    if _describe_all(model, sites) != before:
        raise RefusedError("the forward changes attributes of repeated layers")


def _describe_all(model: torch.nn.Module, sites: Shortened) -> tuple[list[Description], object]:
    """The layers, and the objects that they hold."""
    layers = [model.get_submodule(site.path) for site in sites.sites]
    return [describe(layer) for layer in layers], describe_objects(layers)


@contextmanager
def _replaced(owner: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """An instance attribute that hides the class's, or replaces the instance's own."""
    held = vars(owner)
    previous = [held[name]] if name in held else []
    held[name] = value
    try:
        yield
    finally:
        del held[name]
        held.update((name, old) for old in previous)


def _running(forward: Forward, watched: list[tuple[torch.nn.Module, Place]], trace: _Trace) -> Forward:
    """The forward of the whole, during which looking into hidden layers and using watched numbers is refused."""

    def run(*args: Any, **kwargs: Any) -> Any:
        trace.is_running = True
        try:
            with ExitStack() as stack:
                for layer, (path, name) in watched:
                    owner = layer.get_submodule(path)
                    problem = f"{type(owner).__name__} uses {name}, which differs from layer to layer"
                    stack.enter_context(_replaced(owner, name, _unusable(problem, trace)))
                return forward(*args, **kwargs)
        finally:
            trace.is_running = False

    return run


def _traced_forward(layer: torch.nn.Module, number: int, sites: Shortened, trace: _Trace) -> Forward:
    forward = layer.forward
    site = sites.sites[number]
    is_model = sites.model_layer(site.kind) == number

    def run(*args: Any, **kwargs: Any) -> Any:
        _count(number, site, trace)
        leaves = torch_adapter.tree_leaves((args, kwargs))
        entered = iter(markers.enter(_tensors_of(leaves), number))
        args, kwargs = _with_tensors((args, kwargs), entered)
        signature = _signature(args, kwargs, site, trace)
        outputs = forward(*args, **kwargs)
        results = _tensors_of(torch_adapter.tree_leaves(outputs))
        if is_model:
            inputs = _tensors_of(torch_adapter.tree_leaves((args, kwargs)))
            specs = markers.result_specs(inputs, results)
            plain = all(isinstance(leaf, torch.Tensor | Constant) for leaf in torch_adapter.tree_leaves(outputs))
            if specs is None or not plain:
                raise trace.refusal(f"{site.path} returns tensors that share memory, or other objects")
            trace.references[site.kind] = _Reference(signature, outputs, specs)
        return _with_tensors(outputs, iter(markers.leave(results, number)))

    return run


def _skipped_forward(number: int, sites: Shortened, trace: _Trace) -> Forward:
    site = sites.sites[number]

    def run(*args: Any, **kwargs: Any) -> Any:
        _count(number, site, trace)
        reference = trace.references.get(site.kind)
        if reference is None:
            raise trace.refusal(f"{site.path} is called before the second layer of its kind")
        if _signature(args, kwargs, site, trace) != reference.signature:
            raise trace.refusal(f"{site.path} is called with other arguments than the second layer of its kind")
        values = _tensors_of(torch_adapter.tree_leaves((args, kwargs)))
        return _with_tensors(reference.outputs, iter(markers.skipped(values, number, reference.specs)))

    return run


def _count(number: int, site: Site, trace: _Trace) -> None:
    if number in trace.called:
        raise trace.refusal(f"{site.path} is called more than once")
    trace.called.add(number)


def _tensors_of(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _with_tensors(tree: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The tree with its tensors replaced, in order."""
    return torch_adapter.tree_map(lambda leaf: next(tensors) if isinstance(leaf, torch.Tensor) else leaf, tree)


def _signature(args: Any, kwargs: Any, site: Site, trace: _Trace) -> object:
    """All that a layer's code can learn from its call without the values of tensors."""
    storages: dict[int, int] = {}
    described: list[object] = []
    for key, leaf in torch_adapter.tree_leaves_with_keys((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            storage = storages.setdefault(torch_adapter.storage_key(leaf), len(storages))
            layout = (tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device)
            described.append((key, layout, leaf.requires_grad, storage))
        elif isinstance(leaf, Constant):
            described.append((key, type(leaf), repr(leaf)))
        else:
            raise trace.refusal(f"{site.path} is called with a {type(leaf).__name__}")
    return described, torch_adapter.tree_structure((args, kwargs)), _modes()


def _modes() -> tuple[object, ...]:
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


_USES = (
    "abs", "add", "and", "bool", "call", "complex", "contains", "copy", "deepcopy", "delattr", "delitem", "dir",
    "divmod", "enter", "eq", "exit", "float", "floordiv", "format", "ge", "getattribute", "getitem", "gt", "hash",
    "iadd", "iand", "ifloordiv", "ilshift", "imod", "imul", "index", "int", "invert", "ior", "ipow", "irshift",
    "isub", "iter", "itruediv", "ixor", "le", "len", "lshift", "lt", "matmul", "mod", "mul", "ne", "neg", "next",
    "or", "pos", "pow", "radd", "rand", "rdivmod", "reduce", "reduce_ex", "repr", "reversed", "rfloordiv",
    "rlshift", "rmatmul", "rmod", "rmul", "ror", "round", "rpow", "rrshift", "rshift", "rsub", "rtruediv", "rxor",
    "set", "setattr", "setitem", "str", "sub", "truediv", "trunc", "xor",
)  # fmt: skip
"""Special methods, without underscores."""


def _unusable(problem: str, trace: _Trace) -> object:
    def refuse(*_: object) -> Any:
        raise trace.refusal(problem)

    made: object = type("Number", (), {f"__{use}__": refuse for use in _USES})()
    return made


class _Hidden(dict[str, Any]):
    """An empty dict in place of `_parameters`, `_buffers` or `_modules`; asking it for content is refused.

    Collecting a model's parameters before and after its forward is allowed: that is how they are hidden.
    """

    def __init__(self, content: dict[str, Any], path: str, trace: _Trace) -> None:
        super().__init__()
        self._content = content
        self._path = path
        self._trace = trace

    def _refuse(self) -> None:
        if self._trace.is_running:
            raise self._trace.refusal(f"the model looks into {self._path} from outside")

    def __contains__(self, key: object) -> bool:
        if key in self._content:
            self._refuse()
        return False

    def __iter__(self) -> Iterator[str]:
        self._refuse()
        return super().__iter__()

    def __len__(self) -> int:
        self._refuse()
        return 0

    def items(self) -> Any:
        self._refuse()
        return super().items()

    def values(self) -> Any:
        self._refuse()
        return super().values()

    def keys(self) -> Any:
        self._refuse()
        return super().keys()

    def get(self, key: str, default: Any = None) -> Any:
        key in self  # noqa: B015 - refuses what is there
        return default


@contextmanager
def _hidden(layer: torch.nn.Module, path: str, trace: _Trace) -> Iterator[None]:
    """Within the context the layer has no parameters, buffers and submodules."""
    with ExitStack() as stack:
        for name in ("_parameters", "_buffers", "_modules"):
            hidden = _Hidden(vars(layer)[name], path, trace)
            stack.enter_context(_replaced(layer, name, hidden))
        yield
