"""Profiles in planning: measuring a model's ops into the store, and finding the store's rows again.

The store is one file of the user, unless another is named. Rows count only for the device they were measured on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autopar.cost.hardware import load_cluster
from autopar.errors import InputError
from autopar.planner.detect import detect_gpus, kebab_name

if TYPE_CHECKING:
    from autopar.profiler.measure import EnergyProbe
    from autopar.profiler.store import ProfileStore

STORE_VARIABLE = "AUTOPAR_PROFILE"
NO_PROFILE = "none"


@dataclass(frozen=True)
class LoadedProfile:
    """Rows for one device, or none, and what the plan must say about them.

    Attributes:
        digest: of the file; "" without rows.
    """

    store: ProfileStore | None
    digest: str
    note: str


@dataclass(frozen=True)
class ProfileReport:
    """What a measurement added: rows measured, rows now in the file, ops left out with their reason."""

    path: str
    device: str
    num_measured: int
    num_rows: int
    skipped: dict[str, str]


def default_store() -> Path:
    """`$AUTOPAR_PROFILE`, else `autopar/profile.jsonl` below `$XDG_DATA_HOME` or `~/.local/share`."""
    named = os.environ.get(STORE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "autopar" / "profile.jsonl"


def load_rows(named: str | None, gpu: str) -> LoadedProfile:
    """Rows of the named file, or of the default store if there is one; `none` asks for no rows.

    Raises:
        InputError: a named file that cannot be read, or any file that is no profile.
    """
    path = default_store() if named is None else Path(named)
    if named == NO_PROFILE or (named is None and not path.is_file()):
        return LoadedProfile(None, "", "")
    from autopar.profiler.store import load_profile

    store = load_profile(path, gpu)
    if len(store) == 0:
        note = f"{path} has no measured rows of {gpu}; every price is modelled" if named is not None else ""
        return LoadedProfile(None, "", note)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LoadedProfile(store, digest, f"prefers {len(store)} measured rows of {gpu} in {path} to the model")


def profile_file(
    text: str,
    options: Mapping[str, str],
    device: str,
    path: Path,
    *,
    batch_size: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ProfileReport:
    """Measure the ops of a model, whole and split in two, and add the rows to a store.

    Args:
        text, options: as for `plan_model`.
        device: `cpu` or `cuda:N`.
        path: of the store.
        batch_size: samples in one microbatch; None: those of the example batch.

    Raises:
        InputError: there is no such device, or the GPU has no cost model.
    """
    from autopar.capture.export import capture
    from autopar.capture.source import load_source
    from autopar.profiler.measure import Settings, profile_ops
    from autopar.profiler.store import append_rows

    name = _device_name(device)
    graph = capture(load_source(text, options), batch_size=batch_size).graph
    with ExitStack() as stack:
        energy = None if device == "cpu" else stack.enter_context(_probe(device, name))
        run = profile_ops(graph, Settings(device, name, energy=energy), progress)
    total = append_rows(path, run.rows)
    return ProfileReport(str(path), name, len(run.rows), total, dict(run.skipped))


@contextmanager
def _probe(device: str, name: str) -> Iterator[EnergyProbe]:
    """The energy counter of one GPU, open."""
    from autopar.meters import NvmlMeter
    from autopar.profiler.measure import EnergyProbe

    with NvmlMeter([int(device.partition(":")[2] or 0)]) as meter:
        yield EnergyProbe(meter, load_cluster(name, 1).blocked_w)


def _device_name(device: str) -> str:
    """Name in costmodels/ of `cpu` or `cuda:N`."""
    if device == "cpu":
        return "cpu"
    kind, _, index = device.partition(":")
    found = detect_gpus()
    if kind != "cuda" or not (index or "0").isdecimal() or int(index or 0) >= len(found):
        known = ", ".join(["cpu", *(f"cuda:{i}" for i in range(len(found)))])
        raise InputError(f"no device {device!r} here; this machine has {known}")
    name = kebab_name(found[int(index or 0)])
    if name is None:
        raise InputError(
            f"{found[int(index or 0)]} has no cost model yet (see 'autopar gpus'), so no plan could use it"
        )
    return name
