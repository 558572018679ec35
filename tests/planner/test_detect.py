"""Names that NVML gives boards, and the device files that they mean."""

from __future__ import annotations

import pytest

from autopar.planner.detect import kebab_name, known_gpus

NAMES = {
    "NVIDIA H100 80GB HBM3": "h100-sxm-80gb",
    "NVIDIA H100 PCIe": "h100-pcie-80gb",
    "NVIDIA H200": "h200-sxm-141gb",
    "NVIDIA B200": "b200-sxm-180gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie-80gb",
    "NVIDIA A40": "a40",
    "Tesla V100-SXM2-32GB": "v100-sxm2-32gb",
    "Tesla V100-SXM3-32GB": "v100-sxm3-32gb",
    "Tesla V100-PCIE-32GB": "v100-pcie-32gb",
    "Tesla P100-PCIE-16GB": "p100-pcie-16gb",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "Quadro RTX 6000": "rtx-6000",
    "Tesla K20m": "k20",
    "Tesla K40c": "k40",
}
UNKNOWN = (
    "NVIDIA GH200 480GB",
    "NVIDIA A100-PCIE-40GB", "NVIDIA A10", "NVIDIA RTX A4000", "NVIDIA L40", "NVIDIA GB200", "NVIDIA H100 NVL",
    "NVIDIA H200 NVL", "Tesla V100-SXM2-16GB", "Tesla P100-SXM2-16GB", "Tesla K20Xm", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA RTX 6000 Ada Generation",
)  # fmt: skip


@pytest.mark.parametrize(("product", "name"), NAMES.items())
def test_a_board_is_known_by_the_name_that_nvml_gives_it(product: str, name: str) -> None:
    assert kebab_name(product) == name


@pytest.mark.parametrize("product", UNKNOWN)
def test_a_board_with_another_chip_or_memory_is_not_taken_for_a_known_one(product: str) -> None:
    assert kebab_name(product) is None


def test_every_board_of_nvidia_can_be_found() -> None:
    nameless = {"cpu", "mi300x", "h100-sxm-96gb"}  # the last one has no name of its own
    assert set(NAMES.values()) == {spec.name for spec in known_gpus()} - nameless
