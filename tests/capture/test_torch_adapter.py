"""The private torch APIs that autopar leans on still do what it needs."""

from __future__ import annotations

import pytest
import torch

from autopar import torch_adapter


def test_storage_key_is_shared_by_views_alone() -> None:
    whole, other = torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta")
    assert torch_adapter.storage_key(whole) == torch_adapter.storage_key(whole.t()[1:])
    assert torch_adapter.storage_key(whole) != torch_adapter.storage_key(other)


@pytest.mark.parametrize("target", ["aten.linear.default", "aten.add.Tensor", "aten.to.dtype"])
def test_targets_round_trip(target: str) -> None:
    assert torch_adapter.target_name(torch_adapter.op_overload(target)) == target


@pytest.mark.parametrize(
    ("target", "written"),
    [
        ("aten.add.Tensor", ()),
        ("aten.add_.Tensor", (0,)),
        ("aten.index_put_.default", (0,)),
        ("aten.add.out", ("out",)),
    ],
)
def test_written_arguments(target: str, written: tuple[int | str, ...]) -> None:
    assert torch_adapter.written_arguments(torch_adapter.op_overload(target)) == written


@pytest.mark.parametrize(
    ("target", "functional"),
    [
        ("aten.relu_.default", "aten.relu.default"),
        ("aten.index_put_.default", "aten.index_put.default"),
        ("aten.bernoulli_.float", "aten.bernoulli.p"),
        ("aten.relu.default", None),
    ],
)
def test_functional_overload(target: str, functional: str | None) -> None:
    found = torch_adapter.functional_overload(torch_adapter.op_overload(target))
    assert (found and torch_adapter.target_name(found)) == functional


def test_random_ops_are_known() -> None:
    assert torch_adapter.is_random(torch.ops.aten.dropout.default)
    assert torch_adapter.is_random(torch.ops.aten.rand.default)
    assert not torch_adapter.is_random(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize(
    ("constant", "text"),
    [
        (torch.float32, "dtype:float32"),
        (torch.contiguous_format, "memory_format:contiguous_format"),
        (torch.strided, "layout:strided"),
        (torch.device("cpu"), "device:input"),
        ("constant", "constant"),
        (1.5, 1.5),
        (None, None),
    ],
)
def test_constants_round_trip(constant: object, text: object) -> None:
    assert torch_adapter.encode_constant(constant) == text
    assert torch_adapter.decode_constant(text, "cpu") == constant


def test_unknown_constants_are_refused() -> None:
    with pytest.raises(TypeError, match="a constant of type object"):
        torch_adapter.encode_constant(object())


def test_leaves_have_readable_keys() -> None:
    tree = ({"x": 1, "y": [2, 3]}, 4)
    assert torch_adapter.tree_leaves_with_keys(tree) == [("0.x", 1), ("0.y.0", 2), ("0.y.1", 3), ("1", 4)]


def test_fake_tensors_say_cpu_and_keep_identity() -> None:
    faker, tensor = torch_adapter.Faker(), torch.nn.Parameter(torch.empty(2, 3, device="meta"))
    fake = faker.fake(tensor)
    assert fake is faker.fake(tensor)
    assert (fake.device.type, tuple(fake.shape), fake.requires_grad) == ("cpu", (2, 3), True)


def test_custom_gradients_are_reported_and_torch_is_left_as_it_was() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    seen: list[str] = []
    x = torch.ones(2, requires_grad=True)
    with torch_adapter.custom_gradients_reported(seen.append):
        assert Twice.apply(x).tolist() == [2, 2]
        x.register_hook(lambda gradient: gradient)
    Twice.apply(x)
    x.register_hook(lambda gradient: gradient)
    assert seen == ["autograd.Function Twice", "Tensor.register_hook"]
