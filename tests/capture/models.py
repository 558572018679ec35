"""The ten example models at sizes that run in a moment; every dim divides by 2 and by 4."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from autopar.capture.export import Captured, capture
from autopar.capture.source import ModelSource, load_source

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"

TEXT = {"layers": "4", "hidden": "64", "heads": "4", "vocab": "128", "seq": "16", "batch": "4"}
IMAGES = {"batch": "8", "classes": "8"}
TINY: dict[str, dict[str, str]] = {
    "gpt2": TEXT,
    "llama": {**TEXT, "kv_heads": "4", "ffn": "128", "dtype": "float32"},
    "bert": TEXT,
    "vit": {"layers": "4", "hidden": "64", "heads": "4", "image": "32", "patch": "8", **IMAGES},
    "resnet": {"layers": "3", "width": "8", "image": "64", **IMAGES},
    "t5": {**TEXT, "layers": "4", "ffn": "128", "target": "8"},
    "mixtral": {**TEXT, "layers": "2", "kv_heads": "4", "ffn": "128", "experts": "4", "dtype": "float32"},
    "alexnet": {"width": "8", "hidden": "32", "image": "64", **IMAGES},
    "unet": {"width": "8", "levels": "3", "image": "16", "norm": "batch", **IMAGES},
    "mlp": {"inputs": "32", "hidden": "64", "code": "16", "batch": "8"},
}
NAMES = tuple(TINY)


def source(name: str, **options: str) -> ModelSource:
    """The example at its tiny size, with further options."""
    return load_source(str(EXAMPLES / f"{name}.py"), {**TINY[name], **options})


@lru_cache
def planned(name: str) -> Captured:
    """The tiny example captured on the meta device."""
    return capture(source(name))


@lru_cache
def runnable(name: str) -> Captured:
    """The tiny example captured on the CPU in its own dtype."""
    return capture(source(name), device="cpu")
