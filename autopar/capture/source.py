"""Model sources: where a model and an example batch come from.

A Python file holds either

- `build_model(**options)` returning an `nn.Module`, or an `nn.Module` class or builder function decorated with
  `@autoparallel` (an object with the attribute `__autopar__`; a decorated function counts as a builder if every
  parameter has a default, otherwise it is a train step and `build_model` is used), and
- `example_batch(**options)`: a tensor, a tuple of positional arguments or a dict of keyword arguments, and
- if wanted `loss(output, batch)`, and
- if wanted what `autopar run` trains on: `dataset(**options)`, a `torch.utils.data` dataset whose samples have the form
  of one sample of the batch (or a `DataLoader` around it), or `make_batch(step, **options)`, the whole batch of a step.

With a `loss`, only those parts of the batch are passed to the model which its `forward` accepts (the leading ones
of a tuple, the named ones of a dict), so a batch `(images, labels)` works for a model that takes images alone.
Without, everything is passed and the model must return its loss (a scalar, or `.loss` / `"loss"` in its output).

`hf:PATH` is a Hugging Face config.json, see `capture.hf_source`; `gpt` and `llama` are `capture.families`.

For inference the model runs without its loss (see `capture.inference`); `labels` in a dict batch are then left out
where `forward` has a default for them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from autopar.capture.families import load_family
from autopar.capture.hf_source import load_hf_source
from autopar.capture.model_source import ModelSource, as_arguments, convert_option
from autopar.capture.precision import in_precision, without_precision
from autopar.capture.user_code import user_errors
from autopar.errors import InputError
from autopar.ir.families import FAMILIES
from autopar.ir.inference import INFERENCE, MODE_OPTION, TRAINING

__all__ = ["ModelSource", "as_arguments", "bind_options", "load_source"]


def load_source(text: str, options: Mapping[str, str] | None = None) -> ModelSource:
    """Load `path/model.py`, `hf:config.json` or a built-in family with `--set` options given as text.

    A file called like a family is meant by a path with a slash, e.g. `./gpt`.

    Raises:
        InputError: file missing, not Python, raises at import, without a model, or an unknown or bad option.
    """
    own, precision = without_precision(options or {})
    mode = own.pop(MODE_OPTION, TRAINING)
    source = _load(text, own, is_inference=mode == INFERENCE)
    if mode == INFERENCE:
        return replace(source, is_inference=True, options={**source.options, MODE_OPTION: mode})
    return source if precision is None else in_precision(source, precision)


def _load(text: str, options: dict[str, str], *, is_inference: bool) -> ModelSource:
    if text.startswith("hf:"):
        return load_hf_source(text, options)
    if text in FAMILIES:
        return load_family(text, options, is_inference=is_inference)
    path = Path(text).expanduser()
    if not path.is_file():
        raise InputError(f"{text}: {_missing(text, path)}")
    return _python_source(text, path.resolve(), options)


def _missing(text: str, path: Path) -> str:
    if path.is_dir():
        return "is a directory, not a file"
    is_name = not path.suffix and path.name == text
    return f"no such file, and no built-in model; those are {', '.join(FAMILIES)}" if is_name else "no such file"


def _python_source(text: str, path: Path, options: Mapping[str, str]) -> ModelSource:
    module = _import_file(text, path)
    builder = _find_builder(text, module)
    batch_maker = getattr(module, "example_batch", None)
    if not callable(batch_maker):
        raise InputError(f"{text}: no example_batch(): define a function that returns one batch of inputs")
    loss = getattr(module, "loss", None)
    if loss is not None and not callable(loss):
        raise InputError(f"{text}: `loss` must be a function loss(output, batch)")
    functions = {"builder": builder, "batch_maker": batch_maker} | _data_functions(text, module)
    bound = dict(zip(functions, bind_options(text, options, tuple(functions.values())), strict=True))
    return ModelSource(path.stem, text, loss=loss, user_file=str(path), options=dict(options), **bound)


def _data_functions(text: str, module: ModuleType) -> dict[str, Callable[..., Any]]:
    """`dataset` or `make_batch` of the file, where it has one."""
    found = {name: made for name in ("dataset", "make_batch") if callable(made := getattr(module, name, None))}
    if len(found) > 1:
        raise InputError(f"{text}: has dataset() and make_batch(): one of them says what to train on")
    if "make_batch" in found and not inspect.signature(found["make_batch"]).parameters:
        raise InputError(f"{text}: make_batch(step) takes the number of the step, counted from 0")
    return found


def _import_file(text: str, path: Path) -> ModuleType:
    """Import under a name made from path and content, so that repeated imports neither clash nor go stale."""
    try:
        code = path.read_bytes()
        ast.parse(code, filename=str(path))
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        raise InputError(f"{text}: not a Python file: {error.msg} (line {error.lineno})") from None
    except ValueError as error:
        raise InputError(f"{text}: not a Python file: {error}") from None
    name = f"_autopar_source_{hashlib.sha256(str(path).encode() + b'|' + code).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, path, loader=importlib.machinery.SourceFileLoader(name, str(path))
    )
    if spec is None or spec.loader is None:
        raise InputError(f"{text}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        with user_errors(f"{text}: raises at import", str(path)):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def _find_builder(text: str, module: ModuleType) -> Callable[..., Any]:
    decorated = [
        found
        for found in vars(module).values()
        if "__autopar__" in getattr(found, "__dict__", {}) and getattr(found, "__module__", "") == module.__name__
    ]
    builders = [found for found in decorated if _is_builder(found)]
    if len(builders) > 1:
        names = ", ".join(sorted(b.__name__ for b in builders))
        raise InputError(f"{text}: more than one object is decorated with @autoparallel: {names}")
    if builders:
        found: Callable[..., Any] = builders[0]
        return found
    builder: Callable[..., Any] | None = getattr(module, "build_model", None)
    if callable(builder):
        return builder
    raise InputError(
        f"{text}: no model: define build_model() that returns an nn.Module, or decorate one with @autoparallel"
    )


def _is_builder(found: Any) -> bool:
    if inspect.isclass(found):
        return issubclass(found, torch.nn.Module)
    return callable(found) and all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(found).parameters.values()
    )


def bind_options(
    text: str, options: Mapping[str, str], functions: tuple[Callable[..., Any], ...]
) -> tuple[Callable[..., Any], ...]:
    """Bind to each function the options it takes, converted by the type of the parameter's default.

    Raises:
        InputError: an option that no function takes, a value that does not convert, a parameter without a value.
    """
    signatures = [_options_of(function) for function in functions]
    open_ended = [any(p.kind is p.VAR_KEYWORD for p in s.values()) for s in signatures]
    known = sorted({name for s in signatures for name, p in s.items() if p.kind in _NAMED})
    unknown = sorted(set(options) - set(known)) if not any(open_ended) else []
    if unknown:
        listed = ", ".join(known) if known else "none"
        raise InputError(f"{text}: unknown option {', '.join(unknown)}; options of this model: {listed}")
    bound = []
    for function, signature, is_open in zip(functions, signatures, open_ended, strict=True):
        values: dict[str, Any] = {}
        for name, value in sorted(options.items()):
            if name in signature:
                values[name] = convert_option(text, name, value, signature[name].default)
            elif is_open:
                values[name] = convert_option(text, name, value, None)
        missing = [n for n, p in signature.items() if p.kind in _NAMED and p.default is p.empty and n not in values]
        if missing:
            raise InputError(
                f"{text}: {function.__name__} needs a value for {', '.join(missing)}: --set {missing[0]}=..."
            )
        bound.append(_Bound(function, values))
    return tuple(bound)


def _options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters that options may set: all, but for the step that `make_batch` is called with."""
    parameters = dict(inspect.signature(function).parameters)
    if getattr(function, "__name__", "") == "make_batch":
        del parameters[next(iter(parameters))]
    return parameters


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class _Bound:
    function: Callable[..., Any]
    values: Mapping[str, Any]

    def __call__(self, *step: int) -> Any:
        return self.function(*step, **self.values)
