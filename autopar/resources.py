"""Data files that travel with the package: device files and profiles.

In a wheel they lie under `autopar/_data/`, in a checkout beside the package.
"""

from __future__ import annotations

from pathlib import Path

from autopar.errors import AutoparError


def data_directory(name: str) -> Path:
    """Directory `costmodels` or `profiles`.

    Raises:
        AutoparError: if the installation lacks it.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "_data" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise AutoparError(f"the installation lacks its data directory {name!r}: reinstall autopar")
