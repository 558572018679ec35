"""Codecs of gradients: lengths as priced, what they keep, and the identity of error feedback. No processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.ir.sync import kept_entries, message_bytes, parse_policy
from autopar.runtime.sync.codec import FP8_MAX, Feedback, codec_of
from autopar.runtime.sync.replica import Descent, ModuleTask, Replica
from autopar.runtime.sync.train import TrainOptions

CODED = ("ps-sync", "ps-sync+bf16", "ps-sync+fp8", "ps-sync+top-k=0.1", "ps-sync+top-k=1")


def vector(length: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("text", CODED)
@given(length=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=20, deadline=None)
def test_a_message_has_the_length_that_is_priced(text: str, length: int, dtype: torch.dtype) -> None:
    policy = parse_policy(text)
    given_ = vector(length, 1, dtype)
    message = codec_of(policy).encode(given_)
    assert message.dtype == torch.uint8
    assert message.numel() == message_bytes(policy, length, given_.element_size())
    decoded = codec_of(policy).decode(message, given_)
    assert decoded.dtype == dtype
    assert decoded.shape == given_.shape


@pytest.mark.parametrize(("text", "error"), [("ps-sync", 0.0), ("ps-sync+bf16", 2**-8), ("ps-sync+top-k=1", 0.0)])
def test_entries_come_back_within_their_precision(text: str, error: float) -> None:
    codec, x = codec_of(parse_policy(text)), vector(500, 2)
    assert bool(((codec.decode(codec.encode(x), x) - x).abs() <= error * x.abs()).all())


def test_eight_bits_keep_three_of_mantissa_and_the_largest_entry() -> None:
    codec, x = codec_of(parse_policy("ps-sync+fp8")), vector(500, 3)
    decoded = codec.decode(codec.encode(x), x)
    least = float(x.abs().max()) / FP8_MAX * 2**-6
    normal = x.abs() > least
    assert bool(((decoded - x).abs()[normal] <= 2**-4 * 1.001 * x.abs()[normal]).all())
    at = int(x.abs().argmax())
    assert float(decoded[at]) == pytest.approx(float(x[at]), rel=1e-6)


@pytest.mark.parametrize("text", CODED)
def test_zeros_stay_zeros(text: str) -> None:
    codec, x = codec_of(parse_policy(text)), torch.zeros(17)
    assert not bool(codec.decode(codec.encode(x), x).any())


def test_top_k_keeps_the_largest_as_they_are_and_nothing_else() -> None:
    x = vector(200, 4)
    codec = codec_of(parse_policy("ps-sync+top-k=0.1"))
    decoded = codec.decode(codec.encode(x), x)
    largest = x.abs().sort(descending=True).indices[:20]
    assert set(decoded.nonzero().flatten().tolist()) == set(largest.tolist())
    assert bool((decoded[largest] == x[largest]).all())
    assert kept_entries(0.001, 5) == 1


@pytest.mark.parametrize("text", CODED)
@given(seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_what_was_decoded_and_the_residual_add_up_to_what_was_given(text: str, seeds: list[int]) -> None:
    feedback, given_, decoded = Feedback(codec_of(parse_policy(text))), torch.zeros(64), torch.zeros(64)
    given_, decoded = given_.double(), decoded.double()
    for seed in seeds:
        x = vector(64, seed)
        message, seen = feedback.encode(x)
        torch.testing.assert_close(feedback.codec.decode(message, x), seen, rtol=0, atol=0)
        given_, decoded = given_ + x, decoded + seen
    assert feedback.residual is not None
    torch.testing.assert_close(decoded + feedback.residual, given_, rtol=1e-12, atol=1e-12)


def test_a_replica_shares_its_vectors_with_the_module() -> None:
    module = torch.nn.Linear(3, 2)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x).square().sum()

    replica = Replica(ModuleTask(Loss(), lambda step: ([torch.ones(1, 3)], {})))
    replica.values.fill_(0.5)
    assert bool((module.weight == 0.5).all())
    assert replica.compute(0) == pytest.approx(2 * 2.0**2)
    first = replica.gradient.clone()
    replica.compute(1)
    torch.testing.assert_close(replica.gradient, first)
    torch.testing.assert_close(replica.bucket.gradients()[0], torch.full((2, 3), 4.0))
    Descent(0.1, 0.0).apply(replica.values, replica.gradient)
    torch.testing.assert_close(module.weight.detach(), torch.full((2, 3), 0.1))


def test_descent_with_momentum_is_that_of_torch() -> None:
    mine, theirs = vector(5, 8), torch.nn.Parameter(vector(5, 8))
    descent, optimizer = Descent(0.1, 0.9), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for seed in range(4):
        theirs.grad = vector(5, seed)
        descent.apply(mine, vector(5, seed))
        optimizer.step()
    torch.testing.assert_close(mine, theirs.detach())


def test_parameters_of_several_dtypes_and_no_steps_are_refused() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
    with pytest.raises(InputError, match="one dtype"):
        Replica(ModuleTask(module, lambda step: ([], {})))
    with pytest.raises(InputError, match="at least 1"):
        TrainOptions(steps=0)
