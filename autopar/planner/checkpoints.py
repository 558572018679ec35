"""What `autopar checkpoint` does: lists, exports and imports checkpoints of `autopar run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autopar.errors import InputError
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings


@dataclass(frozen=True)
class Listed:
    """One checkpoint; `fault`: why it cannot be loaded, or ""."""

    directory: str
    step: int
    num_gpus: int
    size_bytes: int
    source: str
    fault: str


def list_checkpoints(root: str) -> tuple[Listed, ...]:
    """Oldest first. Raises InputError if the directory holds none."""
    from autopar.runtime.checkpoint_store import CheckpointStore, read_manifest

    store = CheckpointStore(Path(root))
    found = []
    for step in store.steps():
        directory = store.path(step)
        try:
            checkpoint = read_manifest(directory)
        except InputError as error:
            found.append(Listed(str(directory), step, 0, 0, "", str(error)))
            continue
        position = checkpoint.position
        size = sum(checkpoint.files.values())
        found.append(Listed(str(directory), step, position.num_gpus, size, position.source, ""))
    if not found:
        raise InputError(f"{root}: no checkpoint there; 'autopar run PLAN --checkpoint {root}' writes some")
    return tuple(found)


def export_checkpoint(root: str, target: str, step: int | None = None) -> tuple[str, int]:
    """Write the weights of a checkpoint (the newest) as a `state_dict`; its directory, and how many tensors.

    Raises:
        InputError: no such checkpoint, a damaged one, or a target that cannot be written.
    """
    from autopar.runtime.checkpoint_store import CheckpointStore
    from autopar.runtime.weights import export_weights

    store = CheckpointStore(Path(root))
    chosen = store.latest() if step is None else step
    if chosen is None:
        raise InputError(f"{root}: no whole checkpoint there")
    directory = store.path(chosen)
    return str(directory), export_weights(directory, Path(target))


def import_checkpoint(sources: Sequence[str], plan: Plan, root: str) -> int:
    """Make a checkpoint at step 0 from weights, for runs of the plan; how many tensors the model has no use for.

    Raises:
        InputError, PlanMismatchError: the files are not of the plan's model.
    """
    from autopar.capture.export import capture
    from autopar.capture.source import load_source
    from autopar.planner.execute import start_of
    from autopar.runtime.checkpoint_store import CheckpointStore
    from autopar.runtime.weights import import_weights

    captured = capture(load_source(plan.model.source, plan.model.options), batch_size=plan.model.batch_size)
    graph = captured.graph
    shapes = {f"{kind}/{v.fqn}": tuple(v.meta.shape) for kind in ("parameter", "buffer") for v in graph.outside(kind)}
    start = start_of(plan, RunSettings(), "adamw")
    paths = [Path(source) for source in sources]
    return import_weights(paths, CheckpointStore(Path(root)), shapes, captured.aliases, start)
