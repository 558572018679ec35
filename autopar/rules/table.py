"""The rule table: which family of strategies each op has, as data keyed by op name.

An op that is not listed has no rule: it runs replicated, and the plan says so. Overloads are listed one by one where
they differ and by their packet name (`aten.add`) where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from autopar.ir.graph import Op
from autopar.ir.strategy import AxisStrategy
from autopar.rules import contractions, elementwise, experts, shapes
from autopar.rules.call import Values

Family: TypeAlias = Callable[[Op, Values], tuple[AxisStrategy, ...]]

FAMILIES: Mapping[Family, str] = {
    contractions.linear: "linear",
    contractions.mm: "mm",
    contractions.addmm: "addmm",
    contractions.bmm: "bmm",
    contractions.matmul: "matmul",
    contractions.convolution: "conv1d conv2d conv3d",
    contractions.transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
    contractions.attention: "scaled_dot_product_attention",
    contractions.embedding: "embedding",
    experts.moe_experts: "autopar.moe_experts",
    shapes.view: "view reshape flatten unflatten unsqueeze squeeze _unsafe_view view_as reshape_as",
    shapes.permutation: "transpose permute t numpy_T",
    shapes.expand: "expand expand_as broadcast_to",
    shapes.along_dim: "slice select split split_with_sizes chunk unbind narrow",
    shapes.concatenate: "cat stack",
    shapes.unchanged_dims: (
        "pad constant_pad_nd roll flip repeat max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d"
        " adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d"
        " upsample_bilinear2d upsample_bicubic2d"
    ),
    elementwise.linear_pointwise: "neg contiguous clone alias detach",
    elementwise.broadcast: "broadcast_tensors",
    elementwise.sum_of_terms: "add sub",
    elementwise.product: "mul div",
    elementwise.pointwise: (
        "relu gelu silu tanh sigmoid exp log log1p log2 sqrt rsqrt abs erf sin cos pow reciprocal sign square elu selu"
        " leaky_relu relu6 hardtanh hardswish hardsigmoid mish softplus softsign logsigmoid clamp clamp_min clamp_max"
        " where masked_fill maximum minimum eq ne lt le gt ge logical_and logical_or logical_not logical_xor"
        " bitwise_and bitwise_or bitwise_not __and__ __or__ isnan isinf remainder fmod floor ceil round trunc"
        " floor_divide rsub addcmul addcdiv lerp to _to_copy type_as dropout zeros_like ones_like threshold prelu"
    ),
    elementwise.row_norm: "layer_norm rms_norm",
    elementwise.sample_norm: "group_norm instance_norm",
    elementwise.batch_norm: "batch_norm",
    elementwise.along_last: "softmax log_softmax cumsum sort topk argmax argmin",
    elementwise.reduction: "sum mean",
    elementwise.kept_dims: "amax amin var std logsumexp any all",
    elementwise.pairwise_loss: "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy_with_logits",
    elementwise.cross_entropy: "cross_entropy_loss",
    elementwise.token_loss: "autopar.token_loss",
    elementwise.gather_rows: "gather",
}


def packet(target: str) -> str:
    """`aten.add.Tensor` -> `add`; names outside ATen keep their namespace."""
    return target.split(".")[1] if target.startswith("aten.") else target


def family_of(target: str) -> Family | None:
    """The family that the table gives an op, or None."""
    name = packet(target)
    return next((family for family, names in FAMILIES.items() if name in names.split()), None)
