"""Which GPU to plan for: the one the user named, the one in the machine, or a stated default."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autopar.cost.hardware import list_gpus
from autopar.nvml import NvmlError, open_nvml

known_gpus = list_gpus
"""All devices that have a cost model, by name."""

DEFAULT_GPU = "h100-sxm-80gb"

_NAME_PATTERNS = (
    (r"\bH100.*HBM3", "h100-sxm-80gb"),
    (r"\bH100 PCIe", "h100-pcie-80gb"),
    (r"\bH200(?! NVL)", "h200-sxm-141gb"),
    (r"\bB200", "b200-sxm-180gb"),
    (r"\bA100.*SXM4.*80GB", "a100-sxm-80gb"),
    (r"\bA100.*SXM4.*40GB", "a100-sxm-40gb"),
    (r"\bA100.*80GB PCIe", "a100-pcie-80gb"),
    (r"\bA40\b", "a40"),
    (r"\bV100.*SXM2.*32GB", "v100-sxm2-32gb"),
    (r"\bV100.*SXM3.*32GB", "v100-sxm3-32gb"),
    (r"\bV100.*PCIE.*32GB", "v100-pcie-32gb"),
    (r"\bP100.*PCIE.*16GB", "p100-pcie-16gb"),
    (r"\bL40S\b", "l40s"),
    (r"\bL4\b", "l4"),
    (r"\bRTX 4090$", "rtx-4090"),
    (r"\bQuadro RTX 6000$", "rtx-6000"),
    (r"\bK20[cms]?\b", "k20"),
    (r"\bK40[cmst]?\b", "k40"),
)
"""NVML product name (pattern) to the name of a device file in costmodels/."""


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """The GPU that is planned for and where the choice came from: `flag`, `detected` or `default`.

    Attributes:
        num_found: GPUs in this machine, 0 if none or not looked for.
        note: the sentence that tells the reader.
    """

    name: str
    origin: str
    num_found: int
    note: str


def choose_gpu(named: str | None) -> GpuChoice:
    """The named GPU, else what NVML finds, else the default."""
    if named is not None:
        return GpuChoice(named, "flag", 0, "")
    found = detect_gpus()
    known = [name for name in map(kebab_name, found) if name is not None]
    if known:
        return GpuChoice(
            known[0], "detected", len(found), f"planned for the GPUs found here: {len(found)} x {found[0]}"
        )
    if found:
        note = f"this machine has {found[0]}, which has no cost model; planned for the default, {DEFAULT_GPU}"
        return GpuChoice(DEFAULT_GPU, "default", len(found), note)
    note = f"no GPU found here and none named with --gpu: planned for the default, {DEFAULT_GPU}"
    return GpuChoice(DEFAULT_GPU, "default", 0, note)


def detect_gpus() -> tuple[str, ...]:
    """NVML product names of the GPUs in this machine, in NVML order; () without a driver."""
    try:
        with open_nvml() as nvml:
            return tuple(board.name for board in nvml.boards())
    except NvmlError:
        return ()


def kebab_name(product: str) -> str | None:
    """Name in costmodels/ of an NVML product name, or None."""
    return next((name for pattern, name in _NAME_PATTERNS if re.search(pattern, product, re.IGNORECASE)), None)
