"""Pins in words: the meaning of published tables, the software's switches, and every way to get them wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest

from autopar.cli.pins import KEYS, ONE_WEIRD_TRICK, Pinned, parse_pins, pinned_options
from autopar.errors import InputError
from autopar.ir.software import FUSIONS
from autopar.ir.solution import Pins
from autopar.planner.software import chosen_software


@pytest.mark.parametrize(
    ("text", "batch", "pins", "batch_size"),
    [
        ("", None, {}, None),
        ("tp=2", None, {"dp": 1, "tp": 2}, None),
        ("tp=2, dp=4,mbs=2,zero=3", 16, {"dp": 4, "tp": 2, "num_microbatches": 2, "zero": 3}, 16),
        ("dp=16,mbs=1,gbs=1536", None, {"dp": 16, "tp": 1, "num_microbatches": 96}, 1536),
        ("dp=16,mbs=1,gbs=1536", 1536, {"dp": 16, "tp": 1, "num_microbatches": 96}, 1536),
        ("dp=2,mbs=4,ga=3", None, {"dp": 2, "tp": 1, "num_microbatches": 3}, 24),
        ("dp=2,mbs=4,m=3,ga=3,gbs=24", 24, {"dp": 2, "tp": 1, "num_microbatches": 3}, 24),
        ("tp=8,mbs=4", 8, {"dp": 1, "tp": 8, "num_microbatches": 2}, 8),
        ("m=5", 10, {"num_microbatches": 5}, 10),
        ("gbs=64", None, {}, 64),
        ("pp=8,vpp=3", None, {"pp": 8, "interleave": 3}, None),
        ("tp=8,sp=on", None, {"dp": 1, "tp": 8, "sequence": True}, None),
        ("tp=8,sp=off", None, {"dp": 1, "tp": 8, "sequence": False}, None),
        ("meshes=2x1/1x2,pp=2", None, {"pp": 2, "meshes": ((2, 1), (1, 2)), "roles": True}, None),
        ("cp=2", None, {"dp": 1, "tp": 1, "cp": 2}, None),
        ("dp=8,ep=4,cp=1", None, {"dp": 8, "tp": 1, "ep": 4}, None),
        ("zero=2", None, {"zero": 2}, None),
        ("pp=1,owt=a", None, {"pp": 1, "ops": ONE_WEIRD_TRICK}, None),
        ("owt=b", None, {"ops": ONE_WEIRD_TRICK, "pass_order": "turns"}, None),
        (
            "fc_update=pass,owt=c,passes=4",
            None,
            {"ops": ONE_WEIRD_TRICK, "pass_order": "shares", "num_passes": 4, "pass_update": "pass"},
            None,
        ),
        ("switch=shares", None, {"pass_order": "shares"}, None),
        ("recompute=selective-op", None, {"recompute": "selective-op"}, None),
    ],
)
def test_pins_in_words(text: str, batch: int | None, pins: dict[str, Any], batch_size: int | None) -> None:
    assert parse_pins(text, batch) == Pinned(Pins(**pins), batch_size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m=2,m=3", "--pin m: the same choice is fixed twice"),
        ("m=2,ga=3", "both count the microbatches"),
        ("m=2,mbs=1", "fix dp too"),
        ("dp=1,mbs=3", "a batch of 16 does not divide into microbatches of 3"),
        ("dp=2,mbs=1,m=4", "has 8 microbatches of 2, not 4"),
        ("gbs=8", "--pin gbs=8 and --batch 16 contradict"),
        ("dp", "--pin dp=: expected a whole number"),
        ("dp=0", "at least 1"),
        ("dp=1.5", "a whole number"),
        ("zero=4", "expected one of 0, 1, 2, 3"),
        ("owt=d", "--pin owt=d: expected one of a, b, c"),
        ("owt=a,fc_update=pass", "--pin fc_update=pass: of passes behind a switch; add owt=b, owt=c or switch=shares"),
        ("passes=4", "--pin passes=4: of passes behind a switch"),
        ("owt=b,switch=shares", "--pin owt and switch=shares contradict one another"),
        ("schedule=x", "expected one of 1f1b, gpipe"),
        ("recompute=some", "expected one of none, full, selective, selective-op, alternate"),
        ("sp=yes,tp=2", "expected sp=on or sp=off"),
        ("sp=on", "fix tp too"),
        ("dp=4,ep=3", "dp=4 does not divide by it"),
        ("compile=on,fused=on", "by a compiler or by hand"),
        ("dtype=float32", "expected one of bf16, fp16, fp32"),
        ("op:x", "expected op:REGEX=LABEL"),
        ("meshes=2x1", "expected dp x tp of at least two stages"),
        ("meshes=2x1/1x2,dp=2", "what all stages have alike"),
        ("meshes=2x1/1x2,vpp=2", "not both"),
        ("meshes=2x1/1x2,offload_optimizer=host", "not both"),
        ("meshes=2x1/1x2,pp=3", "meshes names 2 stages"),
        ("mesh=2x1/1x2", "did you mean meshes?"),
    ],
)
def test_bad_pins(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_pins(text, 16)


def test_mbs_alone_needs_something_to_divide() -> None:
    with pytest.raises(InputError, match=r"needs gbs=\.\.\. or --batch"):
        parse_pins("dp=2,mbs=2")


def test_a_typo_lists_every_key() -> None:
    with pytest.raises(InputError, match="--pin recompte: unknown; did you mean recompute\\?") as caught:
        parse_pins("dp=2,recompte=full")
    assert all(key in str(caught.value) for key in KEYS)


def test_the_software_is_returned_beside_the_pins() -> None:
    found = parse_pins("software=megatron,compile=on,overlap=off,fp8=on,dtype=fp16,pp=2")
    assert (found.pins, found.software, found.dtype) == (Pins(pp=2), "megatron", "fp16")
    assert found.switches == {"compile": True, "overlap": False, "fp8": True}


def test_a_dtype_is_an_option_of_built_in_models_alone() -> None:
    pinned = parse_pins("dtype=fp16")
    assert pinned_options("gpt", {"layers": "2"}, pinned) == {"layers": "2", "dtype": "fp16"}
    assert pinned_options("llama", {"dtype": "fp16"}, pinned) == {"dtype": "fp16"}
    assert pinned_options("model.py", {"a": "b"}, parse_pins("pp=2")) == {"a": "b"}
    with pytest.raises(InputError, match="for the built-in models gpt and llama"):
        pinned_options("model.py", {}, pinned)
    with pytest.raises(InputError, match="--set dtype=bf16 contradict"):
        pinned_options("gpt", {"dtype": "bf16"}, pinned)


def test_switches_change_what_they_name() -> None:
    assert chosen_software("autopar", {}).name == "autopar"
    assert [chosen_software("megatron", {"compile": on}).fusion for on in (True, False)] == ["compiled", "fused"]
    assert [chosen_software("megatron", {"fused": on}).fusion for on in (True, False)] == ["fused", "eager"]
    assert {"compiled", "fused", "eager"} == set(FUSIONS)
    off = chosen_software("composer", {"overlap": False})
    assert (off.overlap_gradients, off.prefetch_parameters, off.fp8) == (False, False, False)
    assert chosen_software("composer", {"fp8": True}).fp8
    with pytest.raises(InputError, match="unknown software 'megatorn'; did you mean megatron"):
        chosen_software("megatorn", {})
