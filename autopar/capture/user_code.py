"""Running the user's code: whatever it raises becomes one InputError or CaptureError that names the line at fault."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from autopar.errors import AutoparError, CaptureError, InputError

_OWN = str(Path(__file__).resolve().parent.parent)
_STDLIB = sysconfig.get_paths()["stdlib"]


def is_library_file(filename: str) -> bool:
    """A file of torch, of autopar or of the standard library: never what the user wants to be pointed at."""
    parts = Path(filename).parts
    if filename.startswith("<") or filename.startswith(_OWN):
        return True
    if "site-packages" in parts or "dist-packages" in parts:
        return "torch" in parts or "torch_adapter.py" in parts
    return filename.startswith(_STDLIB)


def choose_frame(frames: Sequence[tuple[str, int]], user_file: str | None) -> tuple[str, int] | None:
    """Innermost frame in the user's file; else innermost outside libraries. `frames`: (file, line), outermost first."""
    innermost = [*reversed(frames)]
    own = (frame for frame in innermost if user_file is not None and frame[0] == user_file)
    other = (frame for frame in innermost if not is_library_file(frame[0]))
    return next(own, None) or next(other, None)


def describe_frame(frame: tuple[str, int] | None) -> str:
    """`model.py:12: if x.sum() > 0:` or the empty string."""
    if frame is None:
        return ""
    code = linecache.getline(*frame).strip()
    return f"{frame[0]}:{frame[1]}: {code}" if code else f"{frame[0]}:{frame[1]}"


def error_frame(error: BaseException, user_file: str | None) -> tuple[str, int] | None:
    """Where in the user's code an exception came from."""
    frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    return choose_frame(frames, user_file)


def first_line(error: BaseException) -> str:
    """Type and first non-empty line of the message, with the next one if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"


@contextmanager
def user_errors(doing: str, user_file: str | None, kind: type[InputError] = InputError) -> Iterator[None]:
    """Turn any exception of user code into `kind`: what we were doing, where it happened, what it said.

    This is the one place that catches everything: user code may raise anything, and none of it is our fault.
    """
    try:
        yield
    except AutoparError:
        raise
    except SystemExit as error:
        raise kind(f"{doing}: the code calls exit({error.code!r})") from None
    except Exception as error:
        raise kind(explain(error, doing, user_file)) from None


def explain(error: Exception, doing: str, user_file: str | None) -> str:
    """One message of a few lines for an exception of user code."""
    where = describe_frame(error_frame(error, user_file))
    lines = [f"{doing}: {_reason(error)}"]
    if where:
        lines.append(f"  at {where}")
    return "\n".join(lines)


_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")


def _reason(error: Exception) -> str:
    text = str(error)
    if type(error).__name__ in _DATA_DEPENDENT or "data-dependent" in text or "on meta tensors" in text:
        return (
            "what runs next, or a shape, depends on the values of a tensor (`if tensor`, `.item()`, a boolean mask), "
            f"which a captured graph cannot express ({first_line(error)})"
        )
    return first_line(error)


def capture_error(doing: str, op: str, frame: tuple[str, int] | None) -> CaptureError:
    """CaptureError that names an op and the user's line."""
    where = describe_frame(frame)
    return CaptureError(f"{doing} ({op})" + (f"\n  at {where}" if where else ""))
