"""Profiles in planning: measuring a model's ops into the store, and finding the store's rows again.

The store is one file of the user, unless another is named. Rows count only for the device they were measured on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.ir.profile import DeviceProfile

if TYPE_CHECKING:
    from autopar.profiler.measure import EnergyProbe
    from autopar.profiler.power import PowerProfile
    from autopar.profiler.store import ProfileStore

STORE_VARIABLE = "AUTOPAR_PROFILE"
NO_PROFILE = "none"
NO_CPU_ENERGY = (
    "energy of ops is not measured on a CPU, whose counters are of whole packages; it stays the device file's"
)


@dataclass(frozen=True)
class LoadedProfile:
    """Rows for one device, or none, and what the plan must say about them.

    Attributes:
        digest: of the file; "" where it holds nothing of the device.
        device: numbers of the device itself, in place of its file's.
    """

    store: ProfileStore | None
    digest: str
    note: str
    device: DeviceProfile | None = None


@dataclass(frozen=True)
class ProfileReport:
    """What a measurement added: rows measured (`num_energies` of them with energy), rows now in the file, ops left out
    with their reason, numbers of the device by path, (seconds, seconds per byte) of transfers and updates by kind, and
    what the reader must know of power and energy.
    """

    path: str
    device: str
    num_measured: int
    num_rows: int
    skipped: dict[str, str]
    numbers: dict[str, float]
    lines: dict[str, tuple[float, float]]
    num_energies: int
    notes: tuple[str, ...]


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
    from autopar.profiler.store import ProfileStore, read_store

    contents = read_store(path)
    store, device = ProfileStore(contents.rows, gpu), contents.devices.get(gpu)
    if len(store) == 0 and device is None:
        note = f"{path} has no measured rows of {gpu}; every price is modelled" if named is not None else ""
        return LoadedProfile(None, "", note)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    note = f"prefers {len(store)} measured rows of {gpu} in {path} to the model"
    if device is not None:
        note += f", which takes {len(device.numbers) + len(device.lines)} numbers of the device from there"
    return LoadedProfile(store if len(store) else None, digest, note, device)


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure and where.

    Attributes:
        device: `cpu` or `cuda:N`.
        batch_sizes: samples in one microbatch, each measured; empty: those of the example batch.
        processes: that measure at once on a CPU, as many as plans will use; a GPU is measured by one.
        is_quick: fewer repeats.
        lock_clocks: measure the power of a GPU at several clocks, where they may be set.
    """

    device: str = "cpu"
    batch_sizes: tuple[int, ...] = ()
    processes: int = 2
    is_quick: bool = False
    lock_clocks: bool = False


def profile_file(
    text: str,
    options: Mapping[str, str],
    request: ProfileRequest,
    path: Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> ProfileReport:
    """Measure the ops of a model, whole and split in two, and the device, and add both to a store.

    Args:
        text, options: as for `plan_model`.
        path: of the store.

    Raises:
        InputError: there is no such device, or the GPU has no cost model.
    """
    from autopar.planner.power import device_name
    from autopar.profiler.store import append_rows
    from autopar.profiler.worker import merged

    name = "cpu" if request.device == "cpu" else device_name(request.device)
    arguments = {
        "source": text, "options": dict(options), "device": request.device, "name": name,
        "batch_sizes": list(request.batch_sizes), "repeats": 3 if request.is_quick else 7,
    }  # fmt: skip
    if request.device == "cpu":
        from autopar.runtime.launch import Job, launch_local

        if progress is not None:
            progress(f"measuring in {request.processes} processes")
        job = Job(f"{__name__}:{measure_worker.__name__}", arguments, request.processes)
        results, notes = launch_local(job, on_line=progress), [NO_CPU_ENERGY]
    else:
        result, power = _on_gpu(arguments, request, progress)
        results, notes = [result], list(power.notes)
    found = merged(results)
    if request.device != "cpu":
        found = replace(found, device=replace(found.device, numbers=(*found.device.numbers, *power.numbers)))
    total = append_rows(path, found.rows, found.device)
    return ProfileReport(
        str(path), name, len(found.rows), total, dict(found.skipped),
        {number.path: number.value for number in found.device.numbers},
        {line.kind: (line.latency_s, line.s_per_byte) for line in found.device.lines},
        sum(row.energy_j is not None for row in found.rows), tuple(notes),
    )  # fmt: skip


def measure_worker(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One process of `profile_file` on a CPU."""
    return _measure(arguments, None, None)


def _on_gpu(
    arguments: Mapping[str, Any], request: ProfileRequest, progress: Callable[[str], None] | None
) -> tuple[dict[str, Any], PowerProfile]:
    """Rows and device of one GPU, and what it draws."""
    from autopar.meters import NvmlMeter
    from autopar.nvml import open_nvml
    from autopar.planner.power import CURVE, OPS, QUICK_CURVE, QUICK_OPS, PowerRequest, board_of, measure_gpu
    from autopar.profiler.gpu_work import products, streams
    from autopar.profiler.measure import EnergyProbe

    device: str = arguments["device"]
    power_request = PowerRequest(arguments["name"], QUICK_CURVE if request.is_quick else CURVE, request.lock_clocks)
    with open_nvml() as nvml:
        board = board_of(nvml, device)
        with NvmlMeter([board.uuid]) as meter:
            power, blocked_w = measure_gpu(
                board, meter, lambda m, rules: (products(device, m, rules), streams(device, m, rules)),
                power_request, progress or (lambda _: None),
            )  # fmt: skip
            probe = EnergyProbe(meter, blocked_w, QUICK_OPS if request.is_quick else OPS)
            return _measure(arguments, probe, progress), power


def _measure(
    arguments: Mapping[str, Any], energy: EnergyProbe | None, progress: Callable[[str], None] | None
) -> dict[str, Any]:
    from autopar.capture.export import capture
    from autopar.capture.source import load_source
    from autopar.profiler.measure import Settings
    from autopar.profiler.worker import measure_graphs

    source = load_source(arguments["source"], arguments["options"])
    sizes: list[int | None] = arguments["batch_sizes"] or [None]
    graphs = [capture(source, batch_size=size).graph for size in sizes]
    settings = Settings(arguments["device"], arguments["name"], repeats=arguments["repeats"], energy=energy)
    return measure_graphs(graphs, settings, progress)
