"""Strategy: one admissible way to run an op on a mesh, as placements of its operands and results.

`AxisStrategy` is the choice on one mesh axis; a `Strategy` is one `AxisStrategy` per axis. The axes are
independent: the local op that axis 0 leaves is again an op of the same kind, to which axis 1 applies its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from autopar.ir.placement import Placement, Sharding


@dataclass(frozen=True, slots=True)
class AxisStrategy:
    """What one axis does to one op.

    Attributes:
        label: what is split, in words: `replicate`, `batch`, `rows`, `columns`, `contract`, `dim2`, ...
        inputs: one placement per entry of `Op.inputs`.
        outputs: one placement per entry of `Op.outputs`.
        splits_work: each rank does 1/n of the FLOPs (false only for `replicate`).
    """

    label: str
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    splits_work: bool


Strategy: TypeAlias = tuple[AxisStrategy, ...]
"""One AxisStrategy per mesh axis, outermost first."""


def input_sharding(strategy: Strategy, index: int) -> Sharding:
    """Placements, over all axes, of input `index`."""
    return tuple(axis.inputs[index] for axis in strategy)


def output_sharding(strategy: Strategy, index: int) -> Sharding:
    """Placements, over all axes, of output `index`."""
    return tuple(axis.outputs[index] for axis in strategy)


PARAMETER_LABELS = ("invariant", "replicated", "zero1", "zero2", "zero3", "sharded")


@dataclass(frozen=True, slots=True)
class ParameterAxisStrategy:
    """How one axis stores and exposes one parameter.

    | label        | storage | exposed | optimizer | traffic                                                        |
    |--------------|---------|---------|-----------|----------------------------------------------------------------|
    | `invariant`  | `I`     | `I`     | `I`       | none: every rank computes the same whole gradient              |
    | `replicated` | `I`     | `R`     | `I`       | all_reduce of the gradient once a step (data parallel)         |
    | `zero1`      | `I`     | `R`     | `S<dim>`  | reduce_scatter of the gradient, all_gather of it, once a step  |
    | `zero2`      | `I`     | `R`     | `S<dim>`  | per microbatch reduce_scatter, all_gather once a step          |
    | `zero3`      | `S<d>`  | `R`     | `S<dim>`  | per microbatch all_gather twice, reduce_scatter once           |
    | `sharded`    | `S<d>`  | `S<d>`  | `S<dim>`  | none (tensor parallel)                                         |

    `storage` is where the parameter lives between steps, `exposed` what the ops that read it see, `optimizer` how
    its optimizer state (and update) is split. Under zero2 a gradient never waits whole for the end of the step: what a
    microbatch leaves is cut at once. If one axis of a parameter says so, its sums over the others follow suit.
    """

    label: str
    storage: Placement
    exposed: Placement
    optimizer: Placement


ParameterStrategy: TypeAlias = tuple[ParameterAxisStrategy, ...]


def storage_sharding(strategy: ParameterStrategy) -> Sharding:
    return tuple(axis.storage for axis in strategy)


def exposed_sharding(strategy: ParameterStrategy) -> Sharding:
    return tuple(axis.exposed for axis in strategy)


def optimizer_sharding(strategy: ParameterStrategy) -> Sharding:
    return tuple(axis.optimizer for axis in strategy)
