"""Software: the stack that a request names, with switches that the user sets on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autopar.cost.software import load_software
from autopar.ir.software import Software, with_master

FUSED_BY = {"compile": "compiled", "fused": "fused"}
"""Switch -> the fusion that it turns on; off, it takes back only that one."""


def chosen_software(name: str, switches: Mapping[str, bool], precision: str | None = None) -> Software:
    """The stack with `compile`, `fused`, `overlap` (gradients and gathered parameters), `fp8` and `tf32` switched.

    Under a precision there is a float32 copy of what is trained.

    Raises:
        InputError: for an unknown name; lists the known ones.
    """
    software = load_software(name) if precision is None else with_master(load_software(name))
    for switch, fusion in FUSED_BY.items():
        if switches.get(switch):
            software = replace(software, fusion=fusion)
        elif switch in switches and software.fusion == fusion:
            software = replace(software, fusion="eager")
    if "overlap" in switches:
        is_on = switches["overlap"]
        software = replace(software, overlap_gradients=is_on, prefetch_parameters=is_on)
    return replace(software, fp8=switches.get("fp8", software.fp8), tf32=switches.get("tf32", software.tf32))
