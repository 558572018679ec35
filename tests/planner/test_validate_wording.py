"""Free texts of published tables, as they stand there or in publications like them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.planner.boards import find_board
from autopar.planner.configuration import configure
from autopar.planner.published import read_tables
from autopar.planner.wording import (
    read_dtype,
    read_memory_kind,
    read_network,
    read_overlap,
    read_percentage,
    read_recompute,
    read_stack,
    read_switch,
    read_zero,
)
from tests.planner.published_rows import row, write_table


@pytest.mark.parametrize(
    ("text", "stack", "policy"),
    [
        ("full (FSDP block checkpointing)", "composer", "full"),
        ("full (assumed: TFLOPs only match 96-coefficient formula)", "megatron", "full"),
        ("full (use_checkpoint=true in config/validation/*)", "megatron", "full"),
        ("none (ACT_CKPT_GRANULARITY null default in conf/custom.yaml)", "megatron-core", "none"),
        ("selective", "megatron", "selective"),
        ("selective", "torchtitan", "selective-op"),
        ("selective layer", "torchtitan", "alternate"),
        ("selective op", "torchtitan", "selective-op"),
        ("selective (per-op SAC, torchtitan default)", "torchtitan", "selective-op"),
        ("yes", "torch", "full"),
        ("activation checkpointing of every block", "torch", "full"),
        ("none", "composer", "none"),
        ("not stated", "torch", None),
        ("not printed", "nanotron", None),
        ("", "torch", None),
    ],
)
def test_recompute(text: str, stack: str, policy: str | None) -> None:
    assert read_recompute(text, stack) == policy


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("3 (FSDP FULL_SHARD)", 3), ("3 (FSDP2)", 3), ("1 (distributed optimizer)", 1), ("0", 0), ("HSDP 8x4", 3),
        ("ZeRO-1", 1), ("distributed optimizer", 1), ("2 (SHARD_GRAD_OP)", 2), ("none (DDP)", 0), ("", None),
        ("not stated", None),
    ],
)  # fmt: skip
def test_zero(text: str, stage: int | None) -> None:
    assert read_zero(text) == stage


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("yes with TP", True), ("no (Megatron-LM pre-SP; not stated)", False), ("not stated", None), ("", None),
        ("yes (float8 tensorwise linear + fp8 all-gather)", True), ("torch.compile", True), ("off", False),
    ],
)  # fmt: skip
def test_switches(text: str, found: bool | None) -> None:
    assert read_switch(text) is found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("fp16 mixed", ("fp16", False)),
        ("float16", ("fp16", False)),
        ("bf16 (fp32 master, FSDP2 mixed precision)", ("bf16", False)),
        ("fp8 hybrid + bf16", ("bf16", True)),
        ("fp8/fp4 (see config)", ("bf16", True)),
        ("fp8", ("bf16", True)),
        ("tf32", ("fp32", False)),
        ("", (None, False)),
    ],
)
def test_dtypes(text: str, found: tuple[str | None, bool]) -> None:
    assert read_dtype(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("use_gradient_bucket=false; 1f1b (config/validation)", {"overlap_gradients": False}),
        ("TP comm overlap (userbuffers), DP overlap; {}", {"overlap_gradients": True, "overlap_tensor": True}),
        ("FSDP prefetch; MP mode DEFAULT", {"prefetch_parameters": True}),
        ("async TP", {"overlap_tensor": True}),
        ("overlap_grad_reduce=false", {"overlap_gradients": False}),
        ("no overlap", {"overlap_gradients": False, "overlap_tensor": False, "prefetch_parameters": False}),
        ("", {}),
    ],
)
def test_overlap(text: str, found: dict[str, bool]) -> None:
    assert read_overlap(text) == found


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("peak_allocated_MiB 61477.19 (reserved 62200)", "allocated"),
        ("peak per GPU (torchtitan metric = max_reserved_gib, reserved_bytes.all.peak)", "reserved"),
        ("activation memory = 62.04 % of the TP-only no-recompute baseline (ratio, no absolute GiB)", "ratio"),
        ("sum of params+optimizer 45.5625 GiB and activations 59.25 GiB (first stage), computed", "analytic"),
        ("", None),
    ],
)
def test_kinds_of_memory(text: str, kind: str | None) -> None:
    assert read_memory_kind(text) == kind


def test_percentages() -> None:
    assert read_percentage("activation memory = 62.04 % of the baseline") == pytest.approx(0.6204)
    assert read_percentage("allocated") is None


@pytest.mark.parametrize(
    ("text", "gigabytes_per_s"),
    [
        ("RoCE 1600 Gb/s per node", 200.0),
        ("NVLink4 in node; RDMA 400 Gb/s per GPU", 400.0),
        ("vTrain config files assume inter-node 800 Gb/s per node; single-node data: NVSwitch", 100.0),
        ("NVLink 600 GB/s, 8x 200 Gb/s HDR InfiniBand", 200.0),
        ("8 HDR InfiniBand HCAs", 200.0),
        ("8 NVIDIA Mellanox 200Gbps HDR InfiniBand HCAs", 200.0),
        ("4 x EDR InfiniBand", 50.0),
        ("50 GB/s per node", 50.0),
        ("1.6 Tb/s per node", 200.0),
        ("NVSwitch", None),
        ("not stated", None),
        ("InfiniBand 200 Gb/s", None),
        ("", None),
    ],
)
def test_networks(text: str, gigabytes_per_s: float | None) -> None:
    found = read_network(text, 8)
    assert (found is None) if gigabytes_per_s is None else found == pytest.approx(gigabytes_per_s * 1e9)


@pytest.mark.parametrize(
    ("hardware", "memory_gb", "name"),
    [
        ("A100-80GB SXM", None, "a100-sxm-80gb"),
        ("A100-40GB", None, "a100-sxm-40gb"),
        ("A100 (DGX-class; paper multi-node cluster)", None, "a100-sxm-80gb"),
        ("A100 (DGX A100 2020; memory size not stated)", None, "a100-sxm-40gb"),
        ("A100", 40.0, "a100-sxm-40gb"),
        ("8x NVIDIA A100 PCIe 80GB", None, "a100-pcie-80gb"),
        ("V100-32GB (DGX-2)", None, "v100-sxm3-32gb"),
        ("V100-32GB", None, "v100-sxm2-32gb"),
        ("NVIDIA H100-SXM5-80GB", None, "h100-sxm-80gb"),
        ("H100 SXM 96GB HBM2e 2.4TB/s, 500 W power limit (Grand Teton)", 96.0, "h100-sxm-96gb"),
        ("NVIDIA Blackwell GPU (B200-SXM-180GB)", None, "b200-sxm-180gb"),
        ("NVIDIA H200-SXM5-141GB", None, "h200-sxm-141gb"),
        ("AMD Instinct MI300X 192GB HBM3", None, "mi300x"),
    ],
)
def test_boards(hardware: str, memory_gb: float | None, name: str) -> None:
    assert find_board(hardware, memory_gb).spec.name == name
    assert find_board(hardware, memory_gb).memory_bytes is None


def test_a_board_of_another_size_keeps_the_size_that_is_stated() -> None:
    board = find_board("V100-16GB", None)
    assert board.spec.name == "v100-sxm2-32gb"
    assert board.memory_bytes is not None
    assert 13e9 < board.memory_bytes < 16e9


@pytest.mark.parametrize("hardware", ["GH200", "TPU v4", "Gaudi2", "H800", "A800-80GB", ""])
def test_unknown_boards_are_refused(hardware: str) -> None:
    with pytest.raises(InputError, match="no cost model"):
        find_board(hardware, None)


@pytest.mark.parametrize(
    ("text", "stack"),
    [
        ("torchtitan benchmarks 2024-12 (PyTorch team) | Table 1: FSDP", "torchtitan"),
        ("MosaicML llm-foundry MPT training benchmarks", "composer"),
        ("MLPerf Training v3.1 results: NVIDIA eos_n64_ngc23.09_nemo | gpt3", "megatron-core"),
        ("Korthikanti et al. 2022 Figure 1 (memory)", "megatron"),
        ("BigScience Megatron-DeepSpeed 176B", "megatron"),
        ("Narayanan et al. SC21 Table 1", "megatron"),
        ("HuggingFace nanotron old_bench", "nanotron"),
        ("somebody's blog", None),
    ],
)
def test_stacks(text: str, stack: str | None) -> None:
    assert read_stack(text) == stack


def test_a_row_becomes_a_configuration(tmp_path: Path) -> None:
    cells = row(
        source_title="MLPerf Training v4.1 results: NVIDIA eos | gpt3", hardware="NVIDIA H100-SXM5-80GB", dtype="fp8",
        interconnect="8x 400 Gb/s NDR", zero="1 (distributed optimizer)", sp="yes", vpp="2", pp="2", n_gpus="8",
        overlap_notes="TP comm overlap, DP overlap", compile="no", fp8="yes", gbs="32",
    )  # fmt: skip
    (found,), _ = read_tables([write_table(tmp_path / "t.csv", [cells])])
    assert found.row is not None
    made = configure(found.row)
    pins, software = made.request.pins, made.request.software
    assert (pins.dp, pins.tp, pins.pp, pins.interleave, pins.sequence, pins.zero) == (2, 2, 2, 2, True, 1)
    assert (pins.num_microbatches, pins.even_cuts, pins.recompute) == (4, True, "none")
    assert (software.name, software.fp8, software.overlap_tensor, software.overlap_gradients) == (
        "megatron-core", True, True, True,
    )  # fmt: skip
    assert (made.request.gpu, made.request.network_bytes_per_s) == ("h100-sxm-80gb", 400e9)
    assert made.options["pad_vocab_to"] == "256"
    assert made.assumed == ("the usual MLP width of gpt",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ""}, "dimensions unknown: no layers"),
        ({"tp": "", "mbs": ""}, "plan unknown: no tp, mbs"),
        ({"model": "Mixtral 8x7B"}, "mixtures of experts"),
        ({"ep": "2"}, "mixtures of experts"),
        ({"model": "Llama2-70B LoRA"}, "frozen models"),
        ({"model": "BERT-large"}, "other than decoders"),
        ({"hardware": "TPU v4"}, "no cost model"),
    ],
)
def test_what_cannot_be_priced_says_why(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    (found,), _ = read_tables([write_table(tmp_path / "t.csv", [row(**changes)])])
    assert found.row is not None
    with pytest.raises(InputError, match=words):
        configure(found.row)


@pytest.mark.parametrize(
    ("model", "params", "ffn", "family"),
    [
        ("Llama 3.1 8B", "", "1408", "llama"),
        ("MPT-7b", "", "2048", "gpt"),
        ("in-house", "0.0136", "2048", "gpt"),
        ("in-house", "0.0178", "2048", "llama"),
    ],
)
def test_families_follow_from_name_or_size(model: str, params: str, ffn: str, family: str, tmp_path: Path) -> None:
    (found,), _ = read_tables([write_table(tmp_path / "t.csv", [row(model=model, params_b=params, ffn=ffn)])])
    assert found.row is not None
    assert configure(found.row).source == family


def test_every_published_row_of_good_quality_is_understood() -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "published"
    if not folder.is_dir():
        pytest.skip(f"no published tables at {folder}")
    rows, notices = read_tables([str(path) for path in sorted(folder.glob("*.csv"))])
    assert len(rows) == sum(len(list(csv.reader(path.open()))) - 1 for path in folder.glob("*.csv"))
    assert notices == ()
    for found in rows:
        assert found.row is not None, (found.name, found.faults)
        if found.quality != "C":
            configure(found.row)
