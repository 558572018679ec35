"""Frontier store: finished plans of one model on one kind of cluster, from which `replan` picks without a search.

A store is an index beside its plan files: `frontier.json` in the directory of `autopar frontier --out-dir`, or
`frontiers/<key>.json` under `planner.cache.cache_directory()`, to which every frontier, sweep and new search adds. The
index holds each plan's figures and the SHA-256 of its file, so that picking reads one plan only. It is written after
the plans, each file whole under its final name. A damaged index of the cache counts as absent, one that the user named
is an error; a plan file that is gone or changed is left out.

Plans belong together that are priced alike: same graph, batch, software, versions, and numbers of the cluster apart
from how many GPUs there are and whether clocks may be locked, which each entry says of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from autopar.cost.hardware import Cluster
from autopar.errors import InputError
from autopar.ir.codec import ADDED, DecodeError, decode, encode, format_json, parse_json
from autopar.ir.plan import Plan
from autopar.ir.serialize import FORMS, dump_plan, parse_plan, write_atomic
from autopar.ir.software import Software
from autopar.ir.solution import Decisions
from autopar.planner.cache import cache_directory
from autopar.planner.manifest import own_hash
from autopar.planner.plan import installed_versions
from autopar.planner.recall import drop_oldest
from autopar.planner.request import Target
from autopar.report.frontier import point_words

STORE_VERSION = 1
INDEX_NAME = "frontier.json"
DIRECTORY = "frontiers"
MAX_PLANS = 256
"""Of one store in the cache; the oldest go first."""
MAX_FILES = 2048
"""In the cache, indices included."""


@dataclass(frozen=True)
class StoreKey:
    """What plans of one store have in common.

    Attributes:
        prices: SHA-256 of every number of the cluster and its profile, apart from the number of GPUs.
        software: SHA-256 of the facts about the software.
        versions: of autopar and of what it plans with.
    """

    graph_hash: str
    batch_size: int
    prices: str
    software: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """One plan: its file beside the index, and the figures by which it is picked.

    Attributes:
        ceiling: on the number of GPUs, for which it was found.
        has_clocks: it locks clocks.
        description: mesh, stages and clocks, for people.
        pinned: what the plan was made under, as in `Plan`.
    """

    file: str
    sha256: str
    description: str
    num_gpus: int
    ceiling: int
    has_clocks: bool
    step_time_s: float
    energy_j: float
    average_power_w: float
    peak_power_w: float
    pinned: Mapping[str, str] | None = field(default=None, metadata=ADDED)


@dataclass(frozen=True)
class Store:
    """Content of an index file."""

    store_version: int
    key: StoreKey
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Stored:
    """An entry and the directory that holds its plan."""

    entry: Entry
    directory: Path

    def load(self) -> Plan:
        """The plan. Raises InputError if its file is gone or is not the one that was stored."""
        path = self.directory / self.entry.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the stored plan {path}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self.entry.sha256:
            raise InputError(f"{path} is not the plan that the frontier's index names; trace the frontier again")
        return parse_plan(content.decode("utf-8"), str(path))


def store_key(plan: Plan, target: Target) -> StoreKey:
    """Key of the stores that the plan belongs to, on a target with its prices."""
    return StoreKey(
        graph_hash=plan.model.graph_hash,
        batch_size=plan.model.batch_size,
        prices=_prices(target),
        software=_digest(encode(plan.software, Software, FORMS)),
        versions=installed_versions(),
    )


def _prices(target: Target) -> str:
    cluster = target.cluster
    if isinstance(cluster, Cluster):
        cluster = replace(cluster, num_gpus=1, free_clocks=True)
    return replace(target, cluster=cluster).input_hash


def _digest(content: object) -> str:
    return hashlib.sha256(format_json(content).encode()).hexdigest()


def write_store(directory: Path, key: StoreKey, plans: Mapping[str, Plan]) -> None:
    """Write plans, by file name, and their index into a directory of the user's. Raises InputError."""
    entries = []
    for name, plan in plans.items():
        text = dump_plan(plan)
        write_atomic(directory / name, text)
        entries.append(entry_of(name, plan, text))
    _write_index(directory / INDEX_NAME, Store(STORE_VERSION, key, tuple(entries)))


def remember(plans: Iterable[Plan], target: Target) -> None:
    """Add plans to the cache's store of their model and prices, or do nothing where that is impossible."""
    for key_text, group in _by_key(plans, target).items():
        index = cache_directory() / DIRECTORY / f"{key_text}.json"
        known = recalled(group[0][0])
        entries = {stored.entry.file: stored.entry for stored in known}
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            for _, plan in group:
                text = dump_plan(plan)
                name = f"{key_text}-{_digest([encode(plan.decisions, Decisions, FORMS), plan.pinned])[:16]}.json"
                write_atomic(index.parent / name, text)
                entries.pop(name, None)
                entries[name] = entry_of(name, plan, text)
            kept = tuple(entries.values())[-MAX_PLANS:]
            _write_index(index, Store(STORE_VERSION, group[0][0], kept))
            drop_oldest(index.parent, MAX_FILES)
        except (OSError, InputError):
            return


def _by_key(plans: Iterable[Plan], target: Target) -> dict[str, list[tuple[StoreKey, Plan]]]:
    found: dict[str, list[tuple[StoreKey, Plan]]] = {}
    for plan in plans:
        key = store_key(plan, target)
        found.setdefault(_cache_name(key), []).append((key, plan))
    return found


def _cache_name(key: StoreKey) -> str:
    """The cache's name for a key; autopar's own code counts there, as in the rest of the cache."""
    return _digest({"key": asdict(key), "code": own_hash()})[:32]


def recalled(key: StoreKey) -> list[Stored]:
    """Entries of the cache for a key."""
    directory = cache_directory() / DIRECTORY
    try:
        store = read_store(directory / f"{_cache_name(key)}.json")
    except InputError:
        return []
    present = [Stored(entry, directory) for entry in store.entries if (directory / entry.file).is_file()]
    return present if store.key == key else []


def read_store(index: Path) -> Store:
    """Read an index file.

    Raises:
        InputError: it cannot be read, or is no index of this version; says where.
    """
    try:
        text = index.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read the frontier store {index}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{index} is no frontier store: it is not UTF-8 text (byte {error.start})") from error
    try:
        content = parse_json(text)
        version = content.get("store_version") if isinstance(content, dict) else None
        if version != STORE_VERSION:
            raise DecodeError("$.store_version", f"expected {STORE_VERSION}, found {version!r}")
        store: Store = decode(content, Store, FORMS)
    except DecodeError as error:
        raise InputError(f"{index} is no frontier store that this autopar can read\n  at {error}") from error
    if any(Path(entry.file).name != entry.file for entry in store.entries):
        raise InputError(f"{index} names a plan outside its own directory")
    return store


def kept_in(directory: Path, key: StoreKey) -> list[Stored]:
    """Entries of a store in a directory of the user's.

    Raises:
        InputError: there is none, it is damaged, or it belongs to another model, cluster, software or version.
    """
    store = read_store(directory / INDEX_NAME)
    for name, own, wanted in (
        ("another model", store.key.graph_hash, key.graph_hash),
        ("another batch size", store.key.batch_size, key.batch_size),
        ("another cluster or profile", store.key.prices, key.prices),
        ("other software", store.key.software, key.software),
        ("other versions", store.key.versions, key.versions),
    ):
        if own != wanted:
            raise InputError(f"the frontier in {directory} is of {name} than the plan; trace it again")
    return [Stored(entry, directory) for entry in store.entries]


def _write_index(index: Path, store: Store) -> None:
    write_atomic(index, format_json(encode(store, Store, FORMS)))


def entry_of(name: str, plan: Plan, text: str) -> Entry:
    """Of a plan whose file has this name and text."""
    predicted = plan.predicted
    return Entry(
        file=name,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        description=point_words(plan),
        num_gpus=plan.decisions.num_gpus,
        ceiling=plan.cluster.num_gpus,
        has_clocks=any(stage.clock_hz for stage in plan.decisions.stages),
        step_time_s=predicted.step_time_s.value,
        energy_j=predicted.energy_j.value,
        average_power_w=predicted.average_power_w.value,
        peak_power_w=predicted.peak_power_w.value,
        pinned=plan.pinned,
    )
