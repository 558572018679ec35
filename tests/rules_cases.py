"""One small call per op that the rules cover: the cases on which every strategy is run sharded and whole.

Sizes are divisible by 2 and 4 where a rule may split them, and different from one another where they must not mix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autopar.ir.graph import Arg, Op, Ref, Value
from autopar.ir.tensor import TensorMeta


@dataclass(frozen=True)
class Tensor:
    """An operand: shape, dtype, and for integers the exclusive upper bound of the values."""

    shape: tuple[int, ...]
    dtype: str = "float64"
    below: int = 4
    origin: str = "op"

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        if self.dtype == "bool":
            return torch.rand(self.shape, generator=generator) > 0.3
        if self.dtype == "int64":
            return torch.randint(0, self.below, self.shape, generator=generator)
        return torch.rand(self.shape, generator=generator, dtype=torch.float64) + 0.25


@dataclass(frozen=True)
class Case:
    """A call; `args` and `kwargs` hold `Tensor`s where operands stand."""

    target: str
    args: tuple[object, ...]
    kwargs: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        shapes = "x".join(str(list(t.shape)).replace(" ", "") for t in self.operands())
        return f"{self.target}-{shapes}"

    def operands(self) -> list[Tensor]:
        return _tensors((*self.args, *(value for _, value in self.kwargs)))


def _tensors(items: tuple[object, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple):
            found += _tensors(item)
    return found


def resolve(target: str) -> object:
    """`aten.add.Tensor` -> torch.ops.aten.add.Tensor."""
    found: object = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def fill(arg: Arg, tensors: list[torch.Tensor]) -> object:
    """The argument with tensors in place of references and torch dtypes in place of their names."""
    if isinstance(arg, Ref):
        return tensors[arg.index]
    if isinstance(arg, tuple):
        return [fill(item, tensors) for item in arg]
    if isinstance(arg, str) and arg.startswith("dtype:"):
        return getattr(torch, arg.removeprefix("dtype:"))
    return arg


def call(target: str, args: tuple[Arg, ...], kwargs: dict[str, Arg], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results of a call as a list."""
    function = resolve(target)
    result = function(*fill(args, tensors), **{k: fill(v, tensors) for k, v in kwargs.items()})  # type: ignore[operator]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def build(case: Case, seed: int = 0) -> tuple[Op, dict[str, Value], list[torch.Tensor]]:
    """The case as an op of the IR, its values, and operands drawn for it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [operand.draw(generator) for operand in case.operands()]
    counter = iter(range(len(tensors)))

    def lift(item: object) -> Arg:
        if isinstance(item, Tensor):
            return Ref(next(counter))
        return tuple(map(lift, item)) if isinstance(item, tuple) else item  # type: ignore[return-value]

    args = tuple(map(lift, case.args))
    kwargs = {name: lift(value) for name, value in case.kwargs}
    results = call(case.target, args, kwargs, [t.clone() for t in tensors])
    names = tuple(f"x{i}" for i in range(len(tensors)))
    outputs = ("y",) if len(results) == 1 else tuple(f"y:{i}" for i in range(len(results)))
    values = {
        name: Value(name, meta(t), operand.origin, t.is_floating_point() and operand.origin != "buffer", name)
        for name, t, operand in zip(names, tensors, case.operands(), strict=True)
    }
    has_grad = any(value.requires_grad for value in values.values())
    values |= {
        name: Value(name, meta(t), "op", has_grad and t.is_floating_point(), name)
        for name, t in zip(outputs, results, strict=True)
    }
    mutates = names[3:5] if case.target.startswith("aten.batch_norm") else ()
    return Op("y", case.target, names, outputs, args, kwargs, mutates=mutates), values, tensors


def meta(tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


T = Tensor


def B(shape: tuple[int, ...]) -> Tensor:  # noqa: N802 - short beside T
    """A buffer: no gradient."""
    return Tensor(shape, origin="buffer")


POINTWISE = [
    *("relu", "gelu", "silu", "tanh", "sigmoid", "exp", "log", "sqrt", "rsqrt", "abs", "neg", "erf", "sin", "cos"),
    *("contiguous", "clone", "softplus", "elu", "reciprocal", "square"),
]
CASES: tuple[Case, ...] = (
    *(Case(f"aten.{name}.default", (T((4, 8, 3)),)) for name in POINTWISE),
    *(Case(f"aten.{name}.Tensor", (T((4, 8)), T((4, 8)))) for name in ("add", "sub", "mul", "div")),
    Case("aten.add.Tensor", (T((4, 8, 6)), T((6,)))),
    Case("aten.add.Tensor", (T((4, 1, 6)), T((8, 1)))),
    Case("aten.broadcast_tensors.default", ((T((4, 8)), T((8,))),)),
    Case("aten.add.Tensor", (T((4, 8)), 0.5)),
    Case("aten.mul.Tensor", (T((4, 8)), 0.5)),
    Case("aten.mul.Tensor", (T((4, 8, 6)), T((1, 8, 1)))),
    Case("aten.pow.Tensor_Scalar", (T((4, 8)), 3)),
    Case("aten.where.self", (T((1, 8), "bool"), T((4, 8)), T(()))),
    Case("aten.masked_fill.Scalar", (T((4, 8)), T((4, 1), "bool"), -1.0)),
    Case("aten.to.dtype", (T((4, 8)), "dtype:float64")),
    Case("aten.eq.Scalar", (T((4, 8), "int64"), 1)),
    Case("aten.linear.default", (T((4, 8, 6)), T((12, 6)), T((12,)))),
    Case("aten.linear.default", (T((8, 6)), T((12, 6)))),
    Case("aten.mm.default", (T((4, 6)), T((6, 8)))),
    Case("aten.addmm.default", (T((8,)), T((4, 6)), T((6, 8)))),
    Case("aten.bmm.default", (T((4, 8, 6)), T((4, 6, 2)))),
    Case("aten.matmul.default", (T((4, 2, 8, 6)), T((4, 2, 6, 8)))),
    Case("aten.matmul.default", (T((4, 2, 8, 6)), T((1, 6, 8)))),
    Case("aten.conv2d.default", (T((4, 6, 8, 8)), T((8, 6, 3, 3)), T((8,)), (1, 1), (1, 1))),
    Case("aten.conv2d.default", (T((4, 6, 8, 8)), T((8, 3, 3, 3)), None, (1, 1), (1, 1), (1, 1), 2)),
    Case("aten.conv_transpose2d.input", (T((4, 6, 5, 5)), T((6, 8, 2, 2)), T((8,)), (2, 2))),
    Case("aten.scaled_dot_product_attention.default", (T((2, 4, 8, 6)), T((2, 4, 8, 6)), T((2, 4, 8, 6)))),
    Case(
        "aten.scaled_dot_product_attention.default",
        (T((2, 4, 8, 6)), T((2, 4, 8, 6)), T((2, 4, 8, 6)), None, 0.0, True),
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (T((2, 4, 8, 6)), T((2, 4, 6, 6)), T((2, 4, 6, 6)), T((2, 1, 8, 6)), 0.0),
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (T((2, 8, 4, 6)), T((2, 4, 4, 6)), T((2, 4, 4, 6))),
        (("enable_gqa", True),),
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (T((2, 8, 4, 6)), T((2, 4, 4, 6)), T((2, 4, 4, 6)), None, 0.0, True),
        (("enable_gqa", True), ("scale", 0.3)),
    ),
    Case("aten.embedding.default", (T((8, 6)), T((4, 2), "int64", 8))),
    Case("aten.view.default", (T((4, 8, 6)), (32, 6))),
    Case("aten.view.default", (T((4, 8, 12)), (4, 8, 4, 3))),
    Case("aten.view.default", (T((4, 2, 3, 8)), (8, 1, 24))),
    Case("aten.reshape.default", (T((32, 6)), (4, 8, -1))),
    Case("aten.flatten.using_ints", (T((4, 8, 2, 3)), 1)),
    Case("aten.unsqueeze.default", (T((4, 8)), 1)),
    Case("aten.squeeze.dim", (T((4, 1, 8)), 1)),
    Case("aten.unflatten.int", (T((4, 8, 3)), 1, (4, 2))),
    Case("aten.transpose.int", (T((4, 8, 6)), 1, -1)),
    Case("aten.permute.default", (T((4, 8, 6)), (2, 0, 1))),
    Case("aten.t.default", (T((4, 8)),)),
    Case("aten.t.default", (T((4, 8), origin="parameter"),)),
    Case("aten.expand.default", (T((1, 8, 6)), (4, -1, -1))),
    Case("aten.expand.default", (T((8, 1)), (4, 8, 6))),
    Case("aten.slice.Tensor", (T((4, 8, 6)), 1, 2, 6)),
    Case("aten.slice.Tensor", (T((4, 8, 6)), 0, 0, 9223372036854775807)),
    Case("aten.select.int", (T((4, 8, 6)), 1, 3)),
    Case("aten.split.Tensor", (T((4, 8, 6)), 2, -1)),
    Case("aten.chunk.default", (T((4, 8, 6)), 2, 1)),
    Case("aten.cat.default", ((T((4, 8)), T((4, 6))), 1)),
    Case("aten.stack.default", ((T((4, 8)), T((4, 8))), 1)),
    Case("aten.pad.default", (T((4, 8)), (0, 2))),
    Case("aten.roll.default", (T((4, 8)), (1,), (1,))),
    Case("aten.max_pool2d.default", (T((4, 8, 6, 6)), (2, 2), (2, 2))),
    Case("aten.adaptive_avg_pool2d.default", (T((4, 8, 6, 6)), (1, 1))),
    Case("aten.avg_pool2d.default", (T((4, 8, 6, 6)), (2, 2))),
    Case("aten.upsample_nearest2d.vec", (T((4, 8, 3, 3)), None, (2.0, 2.0))),
    Case("aten.layer_norm.default", (T((4, 8, 6)), (6,), T((6,)), T((6,)), 1e-5)),
    Case("aten.rms_norm.default", (T((4, 8, 6)), (6,), T((6,)), 1e-5)),
    Case("aten.group_norm.default", (T((4, 8, 6)), 2, T((8,)), T((8,)))),
    Case("aten.batch_norm.default", (T((4, 8, 3)), T((8,)), T((8,)), B((8,)), B((8,)), False, 0.1, 1e-5, False)),
    Case("aten.softmax.int", (T((4, 8, 6)), -1)),
    Case("aten.log_softmax.int", (T((4, 8, 6)), 1)),
    Case("aten.cumsum.default", (T((4, 8)), 1)),
    Case("aten.topk.default", (T((4, 8)), 2)),
    Case("aten.sum.dim_IntList", (T((4, 8, 6)), (1,))),
    Case("aten.sum.default", (T((4, 8)),)),
    Case("aten.mean.dim", (T((4, 8, 6)), (-1,), True)),
    Case("aten.mean.dim", (T((4, 8, 6)), (0, 1))),
    Case("aten.mean.default", (T((4, 8)),)),
    Case("aten.amax.default", (T((4, 8)), (1,))),
    Case("aten.mse_loss.default", (T((4, 8)), T((4, 8)))),
    Case("aten.mse_loss.default", (T((4, 8)), T((4, 8)), 2)),
    Case("aten.binary_cross_entropy_with_logits.default", (T((4, 8)), T((4, 8)))),
    Case("aten.gather.default", (T((4, 8)), 1, T((4, 2), "int64", 8))),
)
"""Ops whose local call is the op itself."""

COLLECTIVE_CASES: tuple[Case, ...] = (
    Case("aten.embedding.default", (T((8, 6)), T((4, 2), "int64", 8))),
    Case("aten.cross_entropy_loss.default", (T((8, 12)), T((8,), "int64", 12))),
    Case("aten.cross_entropy_loss.default", (T((4, 6, 2, 2)), T((4, 2, 2), "int64", 6))),
    Case("aten.cross_entropy_loss.default", (T((8, 12)), T((8,), "int64", 12), None, 1, 3, 0.1)),
    Case("aten.batch_norm.default", (T((4, 8, 3)), T((8,)), T((8,)), B((8,)), B((8,)), True, 0.1, 1e-5, False)),
    Case("aten.dropout.default", (T((4, 8)), 0.5, True)),
    Case(
        "aten.scaled_dot_product_attention.default",
        (T((2, 4, 8, 6)), T((2, 4, 8, 6)), T((2, 4, 8, 6)), None, 0.25),
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (T((2, 4, 8, 6)), T((2, 4, 8, 6)), T((2, 4, 8, 6)), None, 0.25, True),
    ),
)
"""Ops some of whose strategies need collectives or the defined random stream inside: run on real processes."""
