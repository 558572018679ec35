"""Local operations on one rank are the ATen ops that they replace."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from autopar.program import context
from autopar.program.collectives import AxisGroup
from autopar.program.local_ops import attention_dropout, batch_norm, cross_entropy, dropout, embedding_rows
from autopar.program.stream import StreamState, buffer_for_update

ALONE = AxisGroup("x", 1, 0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("classes", [(), (ALONE,)])
def test_cross_entropy_ignores_what_the_serial_op_ignores(classes: tuple[AxisGroup, ...]) -> None:
    logits, target = randn(6, 5), torch.tensor([0, 4, -100, 2, -100, 1])
    found = cross_entropy(logits, target, token_axes=(), class_axes=classes)
    torch.testing.assert_close(found, functional.cross_entropy(logits, target), rtol=1e-13, atol=0)


def test_cross_entropy_smooths_labels() -> None:
    logits, target = randn(6, 5, 2), torch.randint(0, 5, (6, 2))
    found = cross_entropy(logits, target, label_smoothing=0.2, token_axes=(ALONE,), class_axes=())
    expected = functional.cross_entropy(logits, target, label_smoothing=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_embedding_rows_of_the_second_rank_leave_foreign_ids_zero() -> None:
    table, ids = randn(8, 3), torch.tensor([[0, 3, 4], [7, 5, 1]])
    parts = [
        embedding_rows(table[4 * i : 4 * i + 4], ids, row_axes=(AxisGroup("x", 2, i),), num_rows=8) for i in range(2)
    ]
    assert torch.equal(parts[0] + parts[1], table[ids])
    assert torch.equal(parts[1][0, 0], torch.zeros(3, dtype=torch.float64))


def test_embedding_rows_give_the_padding_row_no_gradient() -> None:
    table = randn(4, 3).requires_grad_()
    rows = embedding_rows(table, torch.tensor([5, 6, 1]), 5, row_axes=(AxisGroup("x", 2, 1),), num_rows=8)
    rows.sum().backward()
    assert table.grad is not None
    assert table.grad.sum(1).tolist() == [0.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_normalises_and_tracks_like_the_serial_op(affine: bool) -> None:
    x = randn(4, 3, 5)
    weight, bias = (randn(3), randn(3) + 1) if affine else (None, None)
    ours, theirs = ([torch.zeros(3).double(), torch.ones(3).double()] for _ in range(2))
    found = batch_norm(x, weight, bias, *ours, True, 0.1, 1e-5, batch_axes=(ALONE,))
    expected = functional.batch_norm(x, *theirs, weight, bias, True, 0.1, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_attention_when_nothing_is_dropped(mask: str | None, scale: float | None) -> None:
    query, key, value = randn(2, 4, 6, 8), randn(2, 2, 6, 8) * 0.5, randn(2, 2, 6, 4)
    given = {None: None, "bool": randn(6, 6) > -1, "float": randn(6, 6)}[mask]
    stream = {"op_name": "a", "global_shape": (2, 4, 6, 6), "sharding": "", "axes": (), "stream": StreamState()}
    found = attention_dropout(query, key, value, given, 0.0, mask is None, scale=scale, enable_gqa=True, **stream)
    expected = functional.scaled_dot_product_attention(
        query, key, value, given, 0.0, mask is None, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_slices_of_a_dropout_are_slices_of_the_whole_one() -> None:
    x, stream = torch.ones(4, 6), StreamState(seed=3)
    whole = dropout(x, 0.5, True, op_name="d", global_shape=(4, 6), sharding="", axes=(), stream=stream)
    for i, j in ((0, 1), (1, 2)):
        axes = (AxisGroup("a", 2, i), AxisGroup("b", 3, j))
        part = dropout(
            x[:2, :2], 0.5, True, op_name="d", global_shape=(4, 6), sharding="S0,S1", axes=axes, stream=stream
        )
        assert torch.equal(part, whole[2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
    assert set(whole.unique().tolist()) == {0.0, 2.0}


def test_dropping_everything_gives_zeros_and_evaluation_drops_nothing() -> None:
    x = torch.ones(4)
    stream = {"op_name": "d", "global_shape": (4,), "sharding": "", "axes": (), "stream": StreamState()}
    assert not dropout(x, 1.0, True, **stream).any()
    assert torch.equal(dropout(x, 0.9, False, **stream), x)


def drawn(state: StreamState, name: str = "a", start: int = 0, length: int = 3) -> list[list[float]]:
    """Rows of numbers for a tensor [3 samples, 2]."""
    return state.uniform(name, (3, 2), start, length, torch.device("cpu")).tolist()


def test_streams_differ_by_position_and_name_only() -> None:
    states = [StreamState(*position, samples=3) for position in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    rows = [tuple(row) for state in states for name in ("a", "b") for row in drawn(state, name)]
    assert len(set(rows)) == len(rows) == 24
    assert drawn(StreamState(samples=3)) == drawn(states[0])


@pytest.mark.parametrize("width", [2, 10_000])
def test_a_sample_draws_the_same_in_any_microbatch_and_on_any_rank(width: int) -> None:
    def rows(state: StreamState, start: int, length: int) -> torch.Tensor:
        return state.uniform("a", (2 * state.samples, width), start, length, torch.device("cpu"))

    whole = rows(StreamState(samples=6), 0, 12)
    for count in (1, 2, 3):
        parts = [rows(StreamState(microbatch=m, samples=count), 0, 2 * count) for m in range(6 // count)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(rows(StreamState(microbatch=1, samples=3), 1, 4), whole[7:11])


def test_a_buffer_is_guarded_only_while_recomputing() -> None:
    buffer, stream = torch.zeros(2), StreamState()
    assert buffer_for_update(buffer, stream) is buffer
    with stream.at(0, is_recomputing=True):
        assert buffer_for_update(buffer, stream) is not buffer
    assert buffer_for_update(buffer, stream) is buffer


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_of_split_causal_attention_do_the_same_work(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def count(query: torch.Tensor, key: torch.Tensor, *rest: object) -> torch.Tensor:
        rows, columns = query.shape[-2], key.shape[-2]
        seen.append(rows * columns - rows * (rows - 1) // 2)
        return query

    monkeypatch.setattr(context, "_lower_right", count)
    monkeypatch.setattr(context, "_swap", lambda x, axis: x)
    key = randn(1, 1, 4 * size, 2)
    for i in range(size):
        context.causal_attention(key[..., :4, :], key, key, row_axes=(AxisGroup("x", size, i),))
    scores = [first + second for first, second in zip(seen[::2], seen[1::2], strict=True)]
    assert len(set(scores)) == 1
    assert sum(scores) == 4 * size * (4 * size + 1) // 2
