"""Capture: export a model source on the meta device (to plan) or a real one (to run) and lift it to an OpGraph."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.fake import fake_tensors
from autopar.capture.inference import InferenceForward
from autopar.capture.lift import lift
from autopar.capture.model_source import ModelSource, accepted_parts, as_arguments, leading_dim
from autopar.capture.outside import Wrapped
from autopar.capture.promote import promote
from autopar.capture.repeats import find_repeats
from autopar.capture.shorten import Shortened, plan_sites, shortened
from autopar.capture.user_code import capture_error, choose_frame, explain
from autopar.errors import CaptureError, InputError
from autopar.ir.graph import OpGraph

PREFIX = "model."
"""Where the user's model hangs in the wrapped module: `Value.fqn` leaves it out, `Captured.module` has it."""


class TrainForward(torch.nn.Module):
    """The user's model and its loss as one module: batch in, scalar loss out. The model is the attribute `model`."""

    def __init__(self, model: torch.nn.Module, source: ModelSource, batch: Any) -> None:
        super().__init__()
        self.model = model
        self._source = source
        self._is_single = isinstance(batch, torch.Tensor)
        self._as_dict = isinstance(batch, Mapping)
        self._accepted = accepted_parts(model, batch) if source.loss is not None else None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._accepted is None:
            output = self.model(*args, **kwargs)
        elif self._as_dict:
            output = self.model(**{key: kwargs[key] for key in kwargs if key in self._accepted})
        else:
            output = self.model(*args[: len(self._accepted)])
        batch = kwargs if self._as_dict else args[0] if self._is_single else args
        return self._loss(output, batch)

    def _loss(self, output: Any, batch: Any) -> torch.Tensor:
        if self._source.loss is not None:
            loss = self._source.loss(output, batch)
            what = "loss(output, batch)"
        else:
            loss = _loss_in(output)
            what = "the model"
        if not isinstance(loss, torch.Tensor):
            raise InputError(
                f"{self._source.text}: the model returns {type(output).__name__} without a loss: return a scalar or an "
                "output with `.loss`, or define loss(output, batch)"
            )
        if loss.numel() != 1 or not loss.dtype.is_floating_point:
            raise InputError(
                f"{self._source.text}: {what} returns a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}; "
                "the loss must be one floating-point number (define loss(output, batch))"
            )
        return loss.reshape(()) if loss.dim() else loss


def _loss_in(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return output[0] if output[0].dim() == 0 else None
    return found


def forward_module(source: ModelSource, model: torch.nn.Module, batch: Any) -> TrainForward | InferenceForward:
    """What is traced and run of the source: with its loss, in training mode; or for inference."""
    if not source.is_inference:
        return TrainForward(model, source, batch).train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return InferenceForward(model, source, batch).eval()


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph: the program; shapes are those of `graph.batch_size` samples.
        module: `TrainForward`, or `InferenceForward`; the user's model is `module.model`.
        constants: tensors that the model's code made, by value name.
        inputs: example tensors in the order of `graph.outside("input")`.
        notes: sentences for the reader, e.g. that the model could not be built without memory.
    """

    graph: OpGraph
    module: torch.nn.Module
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def aliases(self) -> dict[str, str]:
        """Further names that the user's `state_dict` has for a tensor of the graph -> the name that the graph has."""
        values = (*self.graph.outside("parameter"), *self.graph.outside("buffer"))
        known = {id(self.tensor(value.name)): value.fqn for value in values}
        named = self.module.get_submodule(PREFIX.removesuffix(".")).state_dict(keep_vars=True)
        return {name: known[id(x)] for name, x in named.items() if id(x) in known and known[id(x)] != name}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a value from outside: parameter, buffer, constant or batch input, by value name."""
        value = self.graph.values[name]
        if value.origin == "constant":
            return self.constants[name]
        if value.origin == "input":
            return self.inputs[[v.name for v in self.graph.outside("input")].index(name)]
        path, _, attribute = f"{PREFIX}{value.fqn}".rpartition(".")
        found = getattr(self.module.get_submodule(path), attribute)
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"{value.fqn} is not a tensor")
        return found


def capture(
    source: ModelSource,
    *,
    batch_size: int | None = None,
    device: str = "meta",
    dtype: torch.dtype | str | None = None,
    every_layer: bool = False,
) -> Captured:
    """Export the source's forward, with its loss or for inference, and lift it.

    Args:
        batch_size: samples; None keeps the example batch. On a real device the first samples of the example are used.
        device: `meta` plans without memory, traced as on a CPU (`capture.fake`); a real device gives a module and
            inputs that can run.
        dtype: convert all floating parameters, buffers, inputs and dtype constants to this one, after the export, so
            that the ops are those of the model's own dtypes.
        every_layer: trace also those layers that `capture.repeats` shows to be alike; the graph is the same.

    Raises:
        InputError: the source's code fails, or gives no loss.
        CaptureError: the model cannot be traced; names the user's line.
    """
    with _uncollected():
        chosen = _capture_whole if every_layer else _capture_alike
        captured = chosen(source, batch_size, device)
    if dtype is None:
        return captured
    wanted = torch_adapter.dtype_of(dtype) if isinstance(dtype, str) else dtype
    return Captured(
        promote(captured.graph, torch_adapter.dtype_name(wanted)),
        captured.module.to(wanted),
        {name: _to_dtype(tensor, wanted) for name, tensor in captured.constants.items()},
        tuple(_to_dtype(tensor, wanted) for tensor in captured.inputs),
        captured.notes,
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: with torch loaded, walking its million objects again and again is a third of the work."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class _Whole:
    """What is exported, and on which device."""

    source: ModelSource
    module: TrainForward | InferenceForward
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    samples: int
    notes: tuple[str, ...]

    def export(self) -> torch.export.ExportedProgram:
        return _export(self.source, self.module, self.args, self.kwargs, self.device)

    def lift(self, exported: torch.export.ExportedProgram, sites: Shortened | None = None) -> Captured:
        leaves = tensor_leaves(self.args, self.kwargs)
        keys = tuple(key for key, _ in leaves)
        source = self.source
        returned = self.module.returned if isinstance(self.module, InferenceForward) else ()
        lifted = lift(
            Wrapped(source.name, source.user_file, PREFIX, exported, self.module, keys, self.samples, sites, returned)
        )
        inputs = tuple(leaf for _, leaf in leaves)
        return Captured(lifted.graph, self.module, lifted.constants, inputs, (*self.notes, *lifted.notes))


def _prepare(source: ModelSource, batch_size: int | None, device: str) -> _Whole:
    notes: list[str] = []
    model = _build(source, device, notes)
    batch, samples = _batch(source, device, batch_size)
    args, kwargs = as_arguments(batch)
    return _Whole(source, forward_module(source, model, batch), args, kwargs, device, samples, tuple(notes))


def _capture_whole(source: ModelSource, batch_size: int | None, device: str) -> Captured:
    whole = _prepare(source, batch_size, device)
    return whole.lift(whole.export())


def _capture_alike(source: ModelSource, batch_size: int | None, device: str) -> Captured:
    """Trace three of each kind of alike layers where that is sure to give the same graph, else all of them.

    A second try starts from a new model: the forward may have changed the first one.
    """
    whole = _prepare(source, batch_size, device)
    repeats = find_repeats(whole.module.model) if device == "meta" else ()
    if not repeats:
        return whole.lift(whole.export())
    sites = plan_sites(repeats)
    try:
        with shortened(whole.module, whole.module.model, repeats, sites):
            exported = whole.export()
        return whole.lift(exported, sites)
    except InputError as error:
        problem = str(error).splitlines()[0]
    captured = _capture_whole(source, batch_size, device)
    return replace(captured, notes=(*captured.notes, f"every layer was traced on its own: {problem}"))


def _to_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _build(source: ModelSource, device: str, notes: list[str]) -> torch.nn.Module:
    with quiet():
        if device != "meta":
            with torch.device(device):
                return source.build_model().to(device)
        try:
            with torch.device("meta"):
                model = source.build_model()
        except InputError as error:
            model = source.build_model().to("meta")
            reason = str(error).splitlines()[0].partition(": ")[2]
            notes.append(f"the model was built in memory, because its code does not run on the meta device ({reason})")
        return model.to("meta")


def _batch(source: ModelSource, device: str, batch_size: int | None) -> tuple[Any, int]:
    """The batch on the device with the wanted number of samples, and that number."""
    with quiet():
        try:
            with torch.device(device):
                batch = source.raw_batch()
        except InputError:
            batch = source.raw_batch()
    samples = leading_dim(batch, source.text)
    wanted = samples if batch_size is None else batch_size
    if wanted < 1:
        raise InputError(f"{source.text}: batch size {wanted}: must be at least 1")
    if device != "meta" and wanted > samples:
        raise InputError(f"{source.text}: batch size {wanted} exceeds the {samples} samples of example_batch")

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if device == "meta":
            shape = (wanted, *leaf.shape[1:]) if has_samples(leaf, samples) else leaf.shape
            return torch.empty(shape, dtype=leaf.dtype, device="meta")
        sliced = leaf.detach().to(device)
        return sliced[:wanted].clone() if has_samples(leaf, samples) and wanted != samples else sliced

    return torch_adapter.tree_map(resize, batch), wanted


def tensor_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Tensors of the batch in the order of the exported graph's inputs, with readable keys."""
    leaves = [*torch_adapter.tree_leaves_with_keys(args), *torch_adapter.tree_leaves_with_keys(kwargs)]
    return [(key, leaf) for key, leaf in leaves if isinstance(leaf, torch.Tensor)]


def has_samples(leaf: torch.Tensor, samples: int) -> bool:
    """Dim 0 of an input counts samples if it equals the batch size."""
    return leaf.dim() > 0 and leaf.shape[0] == samples


def _export(
    source: ModelSource, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: str
) -> torch.export.ExportedProgram:
    """Export; on a real device, if that fails, once more with new tensors made there by default."""
    attempts: list[contextlib.AbstractContextManager[Any]] = [contextlib.nullcontext()]
    if device not in ("meta", "cpu"):
        attempts.append(torch.device(device))
    errors: list[Exception] = []
    for attempt in attempts:
        try:
            with quiet(), attempt, torch_adapter.custom_gradients_reported(partial(_refuse, source.user_file)):
                if device != "meta":
                    return torch.export.export(module, args, kwargs, strict=False)
                with fake_tensors(module, (args, kwargs)) as (fake_args, fake_kwargs):
                    return torch.export.export(module, fake_args, fake_kwargs, strict=False)
        except InputError:
            raise
        except Exception as error:  # the user's forward may raise anything; the first failure is reported below
            errors.append(error)
    shapes = ", ".join(f"{key}: {tuple(leaf.shape)}" for key, leaf in tensor_leaves(args, kwargs))
    text = explain(errors[0], f"{source.text}: the model cannot be captured", source.user_file)
    raise CaptureError(f"{text}\n  example batch: {shapes}") from None


def _refuse(user_file: str | None, what: str) -> None:
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_stack()]
    problem = "the model defines a gradient of its own, which the captured graph would not have"
    raise capture_error(problem, what, choose_frame(frames, user_file))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's and the model's chatter off the terminal; errors still surface as exceptions."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
