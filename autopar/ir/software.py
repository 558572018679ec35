"""Software: how a training program runs, besides what a plan decides.

The default is what autopar's own runtime does. Other values describe other frameworks, so that configurations which
they have run can be priced: which kernels are fused, in which precision parameters are kept, what hides behind what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

PRECISIONS: Mapping[str, str] = MappingProxyType({"bf16": "bfloat16"})
"""What a model may compute in beside a float32 copy that the optimizer updates: name -> dtype."""
PRECISION_OPTION = "autopar:precision"
"""Key of the precision among a model's options; no option of a model's own can be called so."""
FUSIONS = ("eager", "fused", "compiled")
MEMORY_METERS = ("allocated", "reserved")


@dataclass(frozen=True, slots=True)
class Software:
    """Facts about a framework. Bytes are per element; None means those of the parameter's own dtype.

    Attributes:
        name: in `costmodels/software.json`.
        fusion: `eager`: every op of the graph is its own kernel; `fused`: neighbouring pointwise ops are written as
            one kernel by hand; `compiled`: a compiler fuses pointwise ops, reductions and casts.
        fuses_loss: the loss is one kernel on logits in compute precision, written by hand.
        compiles_loss: compilation covers the loss and the cast of its operand too.
        keeps_copy: parameters stay in memory in compute precision; False: only a master copy stays, and what computes
            is made from it (FSDP's mixed precision).
        master_bytes: of a master copy of each trained parameter; 0: none.
        gradient_bytes, state_bytes: of a kept gradient, and of one optimizer state.
        frees_gradients: gradients are freed after the update, and are made anew by the first backward of a step.
        reduce_bytes: of a gradient while it is synchronised.
        copies_gradients: gradients are copied into buckets of up to 25 MiB to be synchronised.
        keeps_sent: a pipeline stage keeps what it sends until its backward, or, interleaved, until the end of the step.
        regathers_operands: under sequence parallelism a column-parallel product keeps its operand as it was before it
            was gathered, and gathers it again for backward, beside a product.
        overlap_gradients: gradients are synchronised in buckets while backward runs.
        prefetch_parameters: the next block's parameters are gathered, and the last one's gradients scattered, while a
            block computes.
        overlap_tensor: collectives next to a GEMM run in pieces beside it.
        fp8: linear layers compute in 8 bits, casts included.
        tf32: float32 matrix products run on tf32 units where the device has them.
        meter: which of the allocator's peaks memory figures mean: bytes handed out, or bytes taken from the device.
    """

    name: str = "autopar"
    fusion: str = "eager"
    fuses_loss: bool = False
    compiles_loss: bool = True
    keeps_copy: bool = True
    master_bytes: float = 0.0
    gradient_bytes: float | None = None
    state_bytes: float | None = None
    frees_gradients: bool = True
    reduce_bytes: float | None = None
    copies_gradients: bool = True
    regathers_operands: bool = False
    keeps_sent: bool = False
    overlap_gradients: bool = False
    prefetch_parameters: bool = False
    overlap_tensor: bool = False
    fp8: bool = False
    tf32: bool = False
    meter: str = "allocated"

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {self.fusion!r}; one of {', '.join(FUSIONS)}")
        if self.meter not in MEMORY_METERS:
            raise ValueError(f"unknown memory meter {self.meter!r}; one of {', '.join(MEMORY_METERS)}")


def with_master(software: Software) -> Software:
    """Beside parameters of 16 bits a float32 copy; gradients, their sums and states in float32. Others' own stays."""
    if software.master_bytes:
        return software
    return replace(software, master_bytes=4.0, gradient_bytes=4.0, state_bytes=4.0, reduce_bytes=4.0)
