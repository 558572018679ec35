"""What the free texts of published tables say: `full (FSDP block checkpointing)`, `3 (FSDP2)`, `yes with TP`.

Each reader looks for the first keyword that it knows and gives None where a text says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SILENT = r"^\W*$|^\W*(not (stated|printed|given|known|published|reported|available)|unknown|unstated|n/?a|default)\b"
NO = r"^\W*(no|none|off|false|0|disabled|without|null)\b"
YES = r"^\W*(yes|on|true|1|enabled|with)\b|torch\.compile|inductor"

_RECOMPUTE = (
    ("selective", r"\bselective|\bsac\b|core.?attn|attention only"),
    ("alternate", r"every (second|other|2nd)|alternate"),
    ("none", r"\b(none|no|off|false|null|disabled)\b"),
    ("full", r"\b(full|yes|true|on|block|blocks|uniform|all|checkpoint\w*|use_checkpoint)\b"),
)
_ZERO = (
    ("3", r"\b3\b|zero-?3|fsdp|full_shard|fully.?shard|hsdp|hybrid_shard"),
    ("2", r"\b2\b|zero-?2|shard_grad_op"),
    ("1", r"\b1\b|zero-?1|distributed.?optimizer|optimizer.?shard|\byes\b"),
    ("0", r"\b0\b|\bno\b|\bnone\b|\bddp\b|\boff\b"),
)
_DTYPES = (
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|float16|\bhalf\b"),
    ("fp32", r"fp32|float32|tf32"),
)
_FP8 = r"fp8|float8|fp4|nvfp4|mxfp8|e4m3"
_OVERLAP = (
    (
        "overlap_gradients",
        r"(\bdp\b|\bddp\b|grad\w*|data.?parallel)[\w\s-]{0,20}overlap|overlap[\w\s-]{0,20}(grad|reduce|\bdp\b|\bddp\b)",
        r"gradient_bucket\W*(false|off|no)|overlap_grad\w*\W*(false|off|no)\b|"
        r"\bno (dp|ddp|gradient)\b[\w\s-]{0,12}overlap|(dp|ddp|gradients?) without overlap",
    ),
    (
        "overlap_tensor",
        r"(\btp\b|tensor)[\w\s-]{0,16}overlap|overlap[\w\s-]{0,16}(\btp\b|tensor)|userbuffers|async\w*.?tp",
        r"\bno (tp|tensor)\b[\w\s-]{0,16}overlap|tp_comm_overlap\W*(false|off|no)\b",
    ),
    ("prefetch_parameters", r"prefetch", r"\bno prefetch|without prefetch|prefetch\W*(false|off|no)\b"),
)
_NO_OVERLAP = r"^\W*(no overlap|without (any )?overlap|not overlapped|overlap\W*(off|no|false|none))\b"
_MEMORY = (
    ("ratio", r"\bratio\b|% of"),
    ("analytic", r"analytic|formula|computed|sum of params"),
    ("reserved", r"reserved|nvidia-smi|nvml"),
    ("allocated", r"allocated"),
)


def _first(text: str, table: Sequence[tuple[str, str]]) -> str | None:
    """The keyword found nearest to the start; the earlier of the table where two begin together."""
    found = [(match.start(), i, word) for i, (word, regex) in enumerate(table) if (match := re.search(regex, text))]
    return min(found)[2] if found else None


def _is_silent(text: str) -> bool:
    return bool(re.search(SILENT, text))


def read_recompute(text: str, stack: str) -> str | None:
    """One of `ir.solution.RECOMPUTE`; torchtitan's `selective` is per op unless the text speaks of layers."""
    low = text.casefold()
    if _is_silent(low):
        return None
    word = _first(low, _RECOMPUTE)
    if word != "selective":
        return word
    if re.search(r"\blayers?\b|every", low):
        return "alternate"
    return "selective-op" if re.search(r"\bops?\b|per.?op", low) or stack == "torchtitan" else "selective"


def read_zero(text: str) -> int | None:
    """0 to 3."""
    low = text.casefold()
    word = None if _is_silent(low) else _first(low, _ZERO)
    return None if word is None else int(word)


def read_switch(text: str) -> bool | None:
    """Yes or no."""
    low = text.casefold()
    if _is_silent(low):
        return None
    return False if re.search(NO, low) else True if re.search(YES, low) else None


def read_dtype(text: str) -> tuple[str | None, bool]:
    """`bf16`, `fp16` or `fp32`, or None, and whether products are in 8 bits; of 8 bits alone the rest is bf16."""
    low = text.casefold()
    is_fp8 = bool(re.search(_FP8, low))
    return _first(low, _DTYPES) or ("bf16" if is_fp8 else None), is_fp8


def read_overlap(text: str) -> dict[str, bool]:
    """Fields of `Software` that the text settles."""
    low = text.casefold()
    if re.search(_NO_OVERLAP, low):
        return {name: False for name, _, _ in _OVERLAP}
    found = {}
    for name, on, off in _OVERLAP:
        if re.search(off, low):
            found[name] = False
        elif re.search(on, low):
            found[name] = True
    return found


def read_memory_kind(text: str) -> str | None:
    """`allocated`, `reserved`, `analytic` (a formula's figure) or `ratio`."""
    return _first(text.casefold(), _MEMORY)


def read_percentage(text: str) -> float | None:
    """`62.04 % of ...` as 0.6204."""
    match = re.search(r"([0-9]+(?:\.[0-9]+)?)\s*%", text)
    return float(match[1]) / 100 if match else None


_LINE_RATES = {"edr": 100, "hdr100": 100, "hdr": 200, "ndr": 400, "xdr": 800}
"""Gb/s of an InfiniBand port by the name of its generation."""
_INSIDE = r"nvlink|nvswitch|in.node|intra|pcie|xgmi"
_RATE = r"([0-9]+(?:\.[0-9]+)?)\s*([gt])(b|bit|bits|byte|bytes)?\s*(?:/\s*s|ps)?\b"


def read_network(text: str, gpus_per_node: int) -> float | None:
    """Bytes per second of all network ports of a node, where the text says per what it counts.

    Understood are `1600 Gb/s per node`, `400 Gb/s per GPU`, `8x 200 Gb/s HDR`, `8 HDR InfiniBand HCAs`; a bare rate
    may be that of a port or of a node, and says nothing.
    """
    for clause in re.split(r"[;,]", text):
        low = clause.casefold()
        if re.search(_INSIDE, low) and not re.search(r"inter.?node|between nodes|network|rdma|infiniband|\bib\b", low):
            continue
        rate = _rate(clause)
        if rate is None:
            continue
        if re.search(r"per (node|server|machine|host)", low):
            return rate
        if re.search(r"per (gpu|device|rank)", low):
            return rate * gpus_per_node
        ports = re.search(r"(?<![\w.])([1-9]|1[0-6])( ?x ?|\s+)(?=[a-z0-9])", low)
        if ports:
            return rate * int(ports[1])
    return None


def _rate(clause: str) -> float | None:
    """Bytes per second that one clause names."""
    match = re.search(_RATE, clause, re.IGNORECASE)
    if match:
        bits = (match[3] or "b") in ("b", "bit", "bits")
        scale = 1e12 if match[2] in "tT" else 1e9
        return float(match[1]) * scale / (8 if bits else 1)
    generation = re.search(r"\b(hdr100|edr|hdr|ndr|xdr)\b", clause, re.IGNORECASE)
    return _LINE_RATES[generation[1].casefold()] * 1e9 / 8 if generation else None


_STACKS = (
    ("torchtitan", r"torchtitan"),
    ("composer", r"llm-foundry|mosaicml|composer"),
    ("nanotron", r"nanotron"),
    ("megatron-core", r"mlperf|mlcommons|\bnemo\b|megatron[- ]core|megatron[- ]bridge|core_r?[0-9]"),
    ("deepspeed", r"(?<!megatron-)deepspeed"),
    (
        "megatron",
        r"megatron|vtrain|korthikanti|calculon|bigscience|\bbloom\b|narayanan|\bsc ?'?21\b|2205\.05198|2104\.04473",
    ),
    ("composer", r"fsdp|fully.?shard"),
)


def read_stack(text: str) -> str | None:
    """Name of a stack in `costmodels/software.json` that a title, reference or model name speaks of."""
    low = text.casefold()
    return next((name for name, regex in _STACKS if re.search(regex, low)), None)
