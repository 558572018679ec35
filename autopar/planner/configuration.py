"""What a published row means: a model of a built-in family, software, GPUs and pins; and whether it can be true.

Nothing is priced here. What the row does not say is assumed, and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from autopar.cost.device import DeviceSpec
from autopar.cost.software import load_software, model_options
from autopar.errors import InputError
from autopar.ir.families import FAMILIES
from autopar.ir.software import Software
from autopar.ir.solution import Pins
from autopar.ir.validation import Fault
from autopar.planner.boards import Board, find_board
from autopar.planner.published import PublishedRow
from autopar.planner.request import PlanRequest
from autopar.planner.wording import (
    read_dtype,
    read_memory_kind,
    read_network,
    read_overlap,
    read_recompute,
    read_stack,
    read_switch,
    read_zero,
)
from autopar.units import GIB

DIMENSIONS = ("layers", "hidden", "heads", "seq")
PLAN = ("n_gpus", "dp", "tp", "pp", "mbs", "gbs")
OTHER_MODELS = (
    (r"mixtral|\bmoe\b|mixture.of.experts|\bdbrx\b|switch transformer", "mixtures of experts"),
    (r"\blora\b|qlora|adapter", "frozen models with adapters"),
    (r"\bbert\b|roberta|\bt5\b|resnet|unet|diffusion|retinanet|dlrm|\bvit\b|whisper|\brnn", "other than decoders"),
)
"""Models that the table's columns do not describe."""
LLAMA_NAMES = r"llama|mistral|qwen|gemma|\byi\b|deepseek|phi-?3|smollm|vicuna|olmo|internlm|baichuan"
GPT_NAMES = r"gpt|mpt|bloom|\bopt\b|turing|megatron|pythia|neox|falcon|mt-nlg"
MODERN = ("h100", "h200", "b200")
"""GPUs that Megatron-LM of 2020 to 2022 never ran on; there it is Megatron Core."""
PARAMETER_DOUBT = 1.5
MEMORY_DOUBT = 1.2
POWER_DOUBT = 1.5
LEAST_USE = 0.001
"""Share of the peak rate below which a step time cannot be meant in seconds."""
PEAK_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Configuration:
    """A published configuration, ready to be priced.

    Attributes:
        source, options: the model.
        words: the plan in short.
        assumed: what the row does not say.
        memory_kind: what its memory figure is, see `wording.read_memory_kind`.
        spec: of the device.
    """

    source: str
    options: Mapping[str, str]
    request: PlanRequest
    words: str
    assumed: tuple[str, ...]
    memory_kind: str
    spec: DeviceSpec

    @property
    def capture_key(self) -> tuple[str, tuple[tuple[str, str], ...], int | None]:
        """Configurations with equal keys share a graph."""
        return self.source, tuple(sorted(self.options.items())), self.request.batch_size


def configure(row: PublishedRow) -> Configuration:
    """The configuration of a row.

    Raises:
        InputError: the row does not say enough, or what it says cannot be priced; the reason is the message.
    """
    missing = [name for name in (*DIMENSIONS, *PLAN) if getattr(row, name) is None]
    if missing:
        kind = "dimensions" if set(missing) & set(DIMENSIONS) else "plan"
        raise InputError(f"{kind} unknown: no {', '.join(missing)}")
    _check_model(row)
    board = find_board(row.hardware, row.gpu_mem_gb)
    stack = _stack(row, board)
    found = _Reader(row, board, stack)
    family = _family(row)
    options = found.model(family)
    request = found.request()
    kind = read_memory_kind(row.mem_kind) or request.software.meter
    return Configuration(family, options, request, _words(request), tuple(found.assumed), kind, board.spec)


def _check_model(row: PublishedRow) -> None:
    text = f"{row.model} {row.source_title}".casefold()
    for regex, what in OTHER_MODELS:
        if re.search(regex, text):
            raise InputError(f"the columns do not describe {what}: {row.model!r}")
    if (row.ep or 1) > 1:
        raise InputError(f"the columns do not describe mixtures of experts: ep={row.ep}")


def _stack(row: PublishedRow, board: Board) -> str:
    text = f"{row.source_title} {row.source_ref} {row.model} {row.zero}"
    stack = read_stack(text) or "torch"
    is_modern = any(name in board.spec.name for name in MODERN)
    return "megatron-core" if stack == "megatron" and is_modern else stack


def _family(row: PublishedRow) -> str:
    """By name, else by which count of parameters is nearer."""
    name = row.model.casefold()
    if re.search(LLAMA_NAMES, name):
        return "llama"
    if re.search(GPT_NAMES, name) or row.params_b is None:
        return "gpt"
    size = row.params_b * 1e9
    return min(("gpt", "llama"), key=lambda family: abs(count_parameters(row, family) - size))


@dataclass
class _Reader:
    """Reads one row; `assumed` grows with what it does not say."""

    row: PublishedRow
    board: Board
    stack: str

    def __post_init__(self) -> None:
        self.assumed: list[str] = [self.board.assumed] if self.board.assumed else []
        if self.stack == "torch":
            self.assumed.append("plain PyTorch as the software")

    def model(self, family: str) -> dict[str, str]:
        """Options of the family: the stack's, then the row's."""
        row, options = self.row, model_options(self.stack, family)
        if "pad_vocab_to" in options:
            options["pad_vocab_to"] = str(int(options["pad_vocab_to"]) * (row.tp or 1))
        sizes = {name: getattr(row, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq")}
        options |= {name: str(size) for name, size in sizes.items() if size is not None}
        defaults = {field.name: field.default for field in fields(FAMILIES[family])}
        if row.vocab is None:
            self.assumed.append(f"a vocabulary of {defaults['vocab']}")
        if row.ffn is None:
            self.assumed.append(f"the usual MLP width of {family}")
        if family == "gpt" and "bloom" in row.model.casefold():
            options["positions"] = "alibi"
        options["dtype"] = self._dtype()
        return options

    def _dtype(self) -> str:
        dtype, _ = read_dtype(self.row.dtype)
        if dtype is None:
            dtype = "bf16" if "bfloat16" in self.board.spec.peak_flops and self.stack != "megatron" else "fp16"
            self.assumed.append(dtype)
        return dtype

    def request(self) -> PlanRequest:
        row = self.row
        per_node = row.gpus_per_node or self.board.spec.gpus_per_node
        return PlanRequest(
            num_gpus=row.n_gpus or 1,
            gpu=self.board.spec.name,
            gpus_per_node=per_node,
            memory_bytes=self.board.memory_bytes,
            network_bytes_per_s=read_network(row.interconnect, per_node),
            pins=self._pins(),
            profile="none",
            batch_size=row.gbs,
            use_all=True,
            with_baselines=False,
            clocks="max",
            software=self._software(),
        )

    def _pins(self) -> Pins:
        row = self.row
        return Pins(
            dp=row.dp,
            tp=row.tp,
            pp=row.pp,
            num_microbatches=(row.gbs or 1) // ((row.mbs or 1) * (row.dp or 1)),
            cp=row.cp if (row.cp or 1) > 1 else None,
            sequence=self._sequence(),
            recompute=self._recompute(),
            schedule="gpipe" if re.search(r"gpipe", row.overlap_notes.casefold()) else "1f1b",
            zero=self._zero(),
            interleave=row.vpp if (row.vpp or 1) > 1 else None,
            even_cuts=(row.pp or 1) > 1,
        )

    def _sequence(self) -> bool | None:
        """Whether norms are split along the sequence where there is a tensor axis; a silent row means no."""
        return bool(read_switch(self.row.sp)) if (self.row.tp or 1) > 1 else None

    def _recompute(self) -> str:
        found = read_recompute(self.row.recompute, self.stack)
        if found is None:
            found = "selective-op" if self.stack == "torchtitan" else "none"
            self.assumed.append(f"recompute {found}")
        return found

    def _zero(self) -> int:
        found = read_zero(self.row.zero)
        if found is None:
            found = 3 if self.stack in ("composer", "torchtitan") else 0
            self.assumed.append(f"ZeRO {found}")
        if found == 2:
            self.assumed.append("ZeRO 2 priced as ZeRO 1")
        return 1 if found == 2 else found

    def _software(self) -> Software:
        row, software = self.row, load_software(self.stack)
        found: dict[str, Any] = dict(read_overlap(row.overlap_notes))
        if read_switch(row.compile):
            found["fusion"] = "compiled"
        if read_switch(row.fp8) or read_dtype(row.dtype)[1]:
            found["fp8"] = True
        meter = read_memory_kind(row.mem_kind)
        if meter in ("allocated", "reserved"):
            found["meter"] = meter
        return replace(software, **found)


def _words(request: PlanRequest) -> str:
    """`dp=8 tp=4 m=16 zero=1 full compiled megatron-core`."""
    pins, software = request.pins, request.software
    sizes = {"dp": pins.dp, "cp": pins.cp, "tp": pins.tp, "pp": pins.pp, "vpp": pins.interleave}
    parts = [f"{name}={size}" for name, size in sizes.items() if size and size > 1]
    parts += ["sp"] if pins.sequence else []
    parts += [f"m={pins.num_microbatches}", f"zero={pins.zero}", str(pins.recompute)]
    facts = {"compiled": software.fusion == "compiled", "fp8": software.fp8}
    return " ".join([*parts, *(name for name, holds in facts.items() if holds), software.name])


def count_parameters(row: PublishedRow, family: str) -> float:
    """Parameters of the family's matrices; without biases, norms, positions and, where unknown, embeddings."""
    hidden, heads, layers = row.hidden or 0, row.heads or 1, row.layers or 0
    attention = hidden * hidden * (2 + 2 * (row.kv_heads or heads) / heads)
    ffn = row.ffn or (4 * hidden if family == "gpt" else 8 * hidden / 3)
    matrices, embeddings = (2, 1) if family == "gpt" else (3, 2)
    return layers * (attention + matrices * hidden * ffn) + embeddings * (row.vocab or 0) * hidden


def plausibility_faults(row: PublishedRow, found: Configuration) -> tuple[Fault, ...]:
    """Figures that the model or the GPU makes impossible, mostly wrong units."""
    return (*_size_faults(row, found.source), *_device_faults(row, found), *_speed_faults(row, found))


def _size_faults(row: PublishedRow, family: str) -> Iterator[Fault]:
    counted = count_parameters(row, family) / 1e9
    if row.params_b is not None and not 1 / PARAMETER_DOUBT <= row.params_b / counted <= PARAMETER_DOUBT:
        unit = "; the unit is 1e9" if row.params_b / counted >= 100 else ""
        yield Fault("params_b", f"{row.params_b:g}, but the dimensions make {counted:.3g}{unit}")


def _device_faults(row: PublishedRow, found: Configuration) -> Iterator[Fault]:
    spec, memory = found.spec, row.mem_gib
    if memory is not None and found.memory_kind in ("allocated", "reserved"):
        has = spec.capacity_bytes / GIB
        least = 2 * count_parameters(row, found.source) / (row.n_gpus or 1) / GIB
        if memory > MEMORY_DOUBT * has:
            unit = "; MiB instead of GiB?" if memory > 100 else ""
            yield Fault("mem_gib", f"{memory:g} GiB, but a {spec.name} has {has:.1f} GiB{unit}")
        elif memory < least:
            yield Fault("mem_gib", f"{memory:g} GiB cannot hold a share of the parameters, {least:.3g} GiB")
    if row.power_w_per_gpu is not None and not 1 <= row.power_w_per_gpu <= POWER_DOUBT * spec.limit_w:
        yield Fault("power_w_per_gpu", f"{row.power_w_per_gpu:g} W, but a {spec.name} is limited to {spec.limit_w:g} W")


def _speed_faults(row: PublishedRow, found: Configuration) -> Iterator[Fault]:
    """Model FLOP alone, 6 per parameter and token, against the peak of the GPUs."""
    spec = found.spec
    dtype = PEAK_DTYPES[found.options["dtype"]]
    peak = max(spec.peak(dtype), spec.peak("float8_e4m3fn") if found.request.software.fp8 else 0.0)
    if row.tflops_per_gpu is not None and row.tflops_per_gpu * 1e12 > peak:
        yield Fault("tflops_per_gpu", f"{row.tflops_per_gpu:g}, but the peak of a {spec.name} is {peak / 1e12:g}")
    if row.step_s is None:
        return
    column = "iter_time_s" if row.iter_time_s is not None else "tokens_per_s_per_gpu"
    flop = 6 * count_parameters(row, found.source) * (row.gbs or 0) * (row.seq or 0)
    use = flop / (row.step_s * peak * (row.n_gpus or 1))
    if use > 1:
        yield Fault(column, f"a step of {row.step_s:g} s needs {use:.3g} times the GPUs' peak rate; is a unit off?")
    elif use < LEAST_USE:
        yield Fault(column, f"a step of {row.step_s:g} s uses {use:.2g} of the GPUs' peak rate; is a unit off?")
