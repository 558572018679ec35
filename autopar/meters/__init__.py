"""Meters: energy of a window of real work, with its source, scope and reason where it is unknown.

`reading` says what a reading is and holds the meters without a device, `gpu` NVML's, `rapl` the processors', `node`
both of a node and sums over nodes, `windows` the rules for repeated work, `zeus` an optional second opinion.
"""

from autopar.meters.gpu import NvmlMeter
from autopar.meters.node import NodeMeter, NodeReading, add_up, node_reading
from autopar.meters.rapl import RaplMeter
from autopar.meters.reading import Counter, EnergyMeter, NullMeter, Reading, ReplayMeter, difference, joined, unknown
from autopar.meters.visible import find_boards, visible_gpus
from autopar.meters.windows import Repeated, WindowRules, measure_repeated, power_at_rest
from autopar.meters.zeus import ZeusMeter

__all__ = [
    "Counter",
    "EnergyMeter",
    "NodeMeter",
    "NodeReading",
    "NullMeter",
    "NvmlMeter",
    "RaplMeter",
    "Reading",
    "Repeated",
    "ReplayMeter",
    "WindowRules",
    "ZeusMeter",
    "add_up",
    "difference",
    "find_boards",
    "joined",
    "measure_repeated",
    "node_reading",
    "power_at_rest",
    "unknown",
    "visible_gpus",
]
