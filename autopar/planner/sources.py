"""Model sources for Python objects, as `capture.source` makes them for files."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from autopar.errors import InputError

if TYPE_CHECKING:
    from autopar.capture.model_source import ModelSource


def source_of(
    model: Any, example_batch: Any = None, options: Mapping[str, str] | None = None, precision: str | None = None
) -> ModelSource:
    """A source for a file, a builder function, an `nn.Module` class or an `nn.Module`, in a precision if given.

    For a function or class, `example_batch` and `loss` come from the module that defines it.

    Raises:
        InputError: it is none of these, or there is no example batch.
    """
    from autopar.capture.precision import in_precision
    from autopar.capture.source import load_source

    found = (
        load_source(model, options or {}) if isinstance(model, str) else _object_source(model, example_batch, options)
    )
    return found if precision is None else in_precision(found, precision)


def _object_source(model: Any, example_batch: Any, options: Mapping[str, str] | None) -> ModelSource:
    import torch

    from autopar.capture.model_source import ModelSource
    from autopar.capture.source import bind_options

    if isinstance(model, torch.nn.Module):
        if example_batch is None:
            raise InputError("parallelising an nn.Module needs example_batch=: one whole batch of inputs")
        name = type(model).__name__
        return ModelSource(name, f"<{name}>", lambda: copy.deepcopy(model), lambda: example_batch)
    if not callable(model):
        raise InputError(f"not a model: {type(model).__name__}; give a file, a function, a class or an nn.Module")
    home = sys.modules[model.__module__]
    maker = getattr(home, "example_batch", None) if example_batch is None else lambda: example_batch
    if maker is None:
        raise InputError(f"{home.__name__} has no example_batch(): define it, or give example_batch=")
    text = f"<{model.__name__}>"
    build, make_batch = bind_options(text, dict(options or {}), (model, maker))
    loss = getattr(home, "loss", None)
    return ModelSource(model.__name__, text, build, make_batch, loss, getattr(home, "__file__", None))


def step_source(function: Callable[[Any, Any], Any], model: Any, batch: Any) -> ModelSource:
    """A source whose model is the whole train step: the model and the user's function around it."""
    import torch

    from autopar.capture.model_source import ModelSource

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            rebuilt = kwargs if isinstance(batch, Mapping) else args if isinstance(batch, tuple | list) else args[0]
            return function(self.model, rebuilt)

    name = f"{function.__module__}.{function.__qualname__}"
    return ModelSource(function.__name__, f"<{name}>", Step, lambda: batch, None, inspect.getsourcefile(function))
