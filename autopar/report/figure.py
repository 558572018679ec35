"""Pictures: the optional matplotlib, and files of reproducible content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autopar.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL_PLOT = "plotting needs matplotlib; install it with: pip install 'autopar[plot]'"


def check_plot() -> None:
    """Raises InputError with the install command where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(INSTALL_PLOT) from error


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a picture; the suffix names the format.

    Raises:
        InputError: the file cannot be written in that format.
    """
    try:
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw {path}: {error}") from error
