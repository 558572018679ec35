"""Tables of measured energy, read from CSV files that are known by their columns; see `energy.py`."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from autopar.cost.hardware import Cluster, load_cluster
from autopar.errors import InputError
from autopar.planner.boards import find_board
from autopar.search.clocks import ClockOption

KINDS = {"forward": "F", "backward": "B"}
COLUMNS = {
    "iterations": {"method", "iteration_time_s", "energy_j"},
    "stages": {"instruction", "time_s", "stage"},
    "points": {"points_in_source", "energy_j"},
    "models": {"architecture", "layers", "hidden"},
    "epochs": {"time_per_epoch_s", "average_power_w", "power_limit_w"},
}
"""Columns that tell what a file holds."""
SCALES = {"one tenth scale": 10.0}
"""What a stage profile's times and energies are multiplied by."""
HERE = Path(__file__).resolve().parent
OWN_MODELS = {"t5": HERE / "models" / "t5.py", "wide-resnet": HERE / "models" / "wide_resnet.py"}
VOCABULARIES = {"bert": "30522", "bloom": "250880"}
"""Those of the public checkpoints; else that of GPT-2."""


@dataclass(frozen=True)
class Tables:
    """Rows as text, by what they are."""

    iterations: Sequence[Mapping[str, str]]
    stages: Sequence[Mapping[str, str]]
    points: Sequence[Mapping[str, str]]
    models: Sequence[Mapping[str, str]]
    epochs: Sequence[Mapping[str, str]]

    def cluster(self, hardware: str, num_gpus: int) -> Cluster | None:
        """One node of a GPU; None: there is no device file."""
        try:
            spec = find_board(hardware, None).spec
        except InputError:
            return None
        return load_cluster(spec.name, num_gpus, gpus_per_node=num_gpus)

    @cached_property
    def _times(self) -> dict[tuple[str, str, int, str], dict[tuple[str, float], float]]:
        """Measured seconds by (model, partition, stage, kind), then by (`MHz` or `W`, setting)."""
        found: dict[tuple[str, str, int, str], dict[tuple[str, float], float]] = defaultdict(dict)
        for row in self.stages:
            if row["kind"].startswith("measured"):
                key = row["model"], row["partition"], int(row["stage"]), KINDS[row["instruction"]]
                setting = ("MHz", row["frequency_mhz"]) if row["frequency_mhz"] else ("W", row["power_limit_w"])
                found[key][setting[0], float(setting[1])] = float(row["time_s"])
        return found

    def limited_s(self, model: str, partition: str, stage: int, kind: str, limit_w: float) -> float | None:
        """Seconds under a power limit."""
        return self._times.get((model, partition, stage, kind), {}).get(("W", limit_w))

    def fastest_s(self, model: str, partition: str, stage: int, kind: str) -> float | None:
        """Seconds at the highest clock or, if that is not there, under the highest limit."""
        times = self._times.get((model, partition, stage, kind), {})
        return times[max(times)[0], max(at for unit, at in times if unit == max(times)[0])] if times else None

    def clocked_s(self, model: str, partition: str) -> dict[tuple[int, str], dict[float, float]]:
        """Seconds by clock in MHz, of stages that were measured at several."""
        found = {}
        for (name, cut, stage, kind), times in self._times.items():
            clocks = {at: time_s for (unit, at), time_s in times.items() if unit == "MHz"}
            if (name, cut) == (model, partition) and len(clocks) > 1:
                found[stage, kind] = {at: time_s for at, time_s in clocks.items() if at < max(clocks)}
        return found

    def profile(self, model: str) -> dict[tuple[int, str], tuple[ClockOption, ...]]:
        """Measured options of every stage, where energies were measured too."""
        found: dict[tuple[int, str], list[ClockOption]] = defaultdict(list)
        for row in self.stages:
            if row["model"] == model and row["energy_j"] and row["frequency_mhz"]:
                scale = next((factor for words, factor in SCALES.items() if words in row["kind"]), 1.0)
                option = ClockOption(
                    float(row["frequency_mhz"]), scale * float(row["time_s"]), scale * float(row["energy_j"])
                )
                found[int(row["stage"]), KINDS[row["instruction"]]].append(option)
        return {key: tuple(options) for key, options in found.items()}

    def frontiers(self) -> dict[tuple[str, str, int, int], list[tuple[float, float]]]:
        """Points (s, J) by GPU, model, microbatches and GPUs per stage, by time."""
        found = defaultdict(list)
        for row in self.points:
            key = row["gpu"], row["model"], int(row["n_microbatches"]), int(row["tp"])
            found[key].append((float(row["iteration_time_s"]), float(row["energy_j"])))
        return {key: sorted(points) for key, points in found.items()}

    def published_saving(self, model: str, microbatches: int) -> float | None:
        """Share of the energy at maximum power that the fastest published plan saves."""
        rows = [r for r in self.iterations if r["model"] == model and r["n_microbatches"] == str(microbatches)]
        whole = [float(row["energy_j"]) for row in rows if row["method"] == "max power"]
        plans = [
            float(row["energy_j"]) for row in rows if row["method"] == "Perseus" and row["policy"] == "fastest plan"
        ]
        return 1 - plans[0] / whole[0] if whole and plans else None

    def model(self, name: str, batch: int) -> tuple[str, dict[str, str], int] | None:
        """Source, options and batch of a model; None: its form is not known."""
        row = next((row for row in self.models if row["model"] == name), None)
        own = next((path for start, path in OWN_MODELS.items() if name.startswith(start)), None)
        if own is not None:
            return str(own), {}, batch
        if row is None or not row["seq"]:
            return None
        sizes = {key: row[key] for key in ("layers", "hidden", "heads", "seq")}
        vocabulary = next((size for start, size in VOCABULARIES.items() if name.startswith(start)), "50257")
        alibi = {"positions": "alibi"} if name.startswith("bloom") else {"dropout": "0.1"}
        return "gpt", {**sizes, "vocab": vocabulary, "attention": "unfused", "dtype": "fp32", **alibi}, batch

    def programs(self) -> dict[tuple[str, ...], dict[float, tuple[float, float]]]:
        """(s, W) by power limit, of every program on one GPU."""
        found: dict[tuple[str, ...], dict[float, tuple[float, float]]] = defaultdict(dict)
        for row in self.epochs:
            key = tuple(row[name] for name in ("hardware", "dataset", "network", "batch_size", "optimizer"))
            found[key][float(row["power_limit_w"])] = float(row["time_per_epoch_s"]), float(row["average_power_w"])
        return found


def read_tables(paths: Sequence[Path]) -> Tables:
    """All CSV files, and those in directories; files with other columns are left out."""
    files = [file for path in paths for file in (sorted(path.glob("*.csv")) if path.is_dir() else [path])]
    rows: dict[str, list[Mapping[str, str]]] = {name: [] for name in COLUMNS}
    for file in files:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            kinds = [name for name, columns in COLUMNS.items() if columns <= set(reader.fieldnames or ())]
            for name in kinds[:1]:
                rows[name] += list(reader)
    return Tables(**rows)
