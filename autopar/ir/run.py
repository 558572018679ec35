"""RunSettings: what `autopar run` does besides the plan; JSON on its way to the workers."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.errors import InputError
from autopar.ir.offload import NOWHERE, Offload


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run.

    Attributes:
        steps: in all, those of earlier runs included whose checkpoint is taken up.
        clip_norm: scale the gradients of a step so that their common norm is at most this; None: as they are.
        checkpoints: directory; "": none are written, and none is taken up.
        every: steps between checkpoints; 0: one at the end.
        keep: how many checkpoints stay.
        is_async: checkpoints are written while training goes on.
        data_seed: of the order of samples.
        data_workers: loader processes per rank; None: as the model file's `DataLoader` says, else none.
        adapt: go on without a device that makes the others wait, where that is faster.
        compile: backend of `torch.compile` for the stages; "": as the plan was priced.
        offload_dir: where the nameless file of what the plan offloads to disk lies; "": among temporary files.
    """

    steps: int = 10
    clip_norm: float | None = None
    checkpoints: str = ""
    every: int = 0
    keep: int = 3
    is_async: bool = False
    data_seed: int = 0
    data_workers: int | None = None
    adapt: bool = False
    compile: str = ""
    offload_dir: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises InputError."""
        if self.steps < 1:
            raise InputError(f"--steps must be at least 1, got {self.steps}")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise InputError(f"--clip-norm must be a positive number, got {self.clip_norm:g}")
        if self.every < 0 or self.keep < 1:
            raise InputError("--checkpoint-every must be at least 0, and --keep at least 1")
        if self.data_workers is not None and self.data_workers < 0:
            raise InputError(f"--data-workers must be at least 0, got {self.data_workers}")
        if not self.checkpoints and (self.every or self.is_async or self.adapt):
            raise InputError("--checkpoint-every, --async-checkpoints and --adapt need --checkpoint DIR")

    def check_offload(self, offload: Offload) -> None:
        """Raises InputError where a plan that offloads so cannot be run under these settings."""
        if self.offload_dir and "disk" not in (offload.optimizer, offload.activations):
            raise InputError(f"--offload-dir {self.offload_dir}: the plan offloads nothing to disk")
        if self.compile and offload.activations != NOWHERE:
            raise InputError(
                "--compile: the plan offloads activations, and what a compiled stage saves cannot be taken"
            )
