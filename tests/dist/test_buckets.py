"""Buckets: which tensors share a collective, how slices are laid out, and when the sums start."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopar.program.flat import in_groups, slices_of, stacked_slices, views
from tests.dist.ranks import run_on


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), max_size=20), st.integers(1, 100))
def test_groups_hold_equal_keys_in_order_up_to_the_limit(items: list[tuple[str, int]], limit: int) -> None:
    groups = in_groups(
        list(enumerate(items)), lambda item: item[1][0], lambda item: torch.empty(item[1][1], dtype=torch.int8), limit
    )
    assert sorted(item for group in groups for item in group) == list(enumerate(items))
    for group in groups:
        assert len({key for _, (key, _) in group}) == 1
        assert group == sorted(group)
        assert len(group) == 1 or sum(size for _, (_, size) in group) <= limit
    for key in "ab":
        own = [[size for _, (_, size) in group] for group in groups if group[0][1][0] == key]
        assert all(sum(before) + after[0] > limit for before, after in itertools.pairwise(own))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=4))
def test_slices_are_those_of_chunk(shapes: list[tuple[int, int, int]]) -> None:
    count = 3
    dims = [dim for _, _, dim in shapes]
    tensors = [torch.rand(a * (count if d == 0 else 1), b * (count if d == 1 else 1)) for a, b, d in shapes]
    stacked = stacked_slices(tensors, dims, count)
    for rank in range(count):
        expected = [x.chunk(count, dim)[rank] for x, dim in zip(tensors, dims, strict=True)]
        for found, piece in zip(views(stacked[rank], [e.shape for e in expected]), expected, strict=True):
            assert torch.equal(found, piece)
            assert found.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    assert slices_of(tensors[0], dims[0], count).numel() == math.prod(tensors[0].shape)


@pytest.mark.dist
def test_sums_start_during_backward_and_one_serves_many_parameters() -> None:
    for facts in run_on(2, "tests.dist.worker:bucket_facts", {}):
        by_setting = {(fact["overlap"], fact["size"]): fact for fact in facts}
        parameters = facts[0]["parameters"]
        assert (by_setting[False, 1.0]["early"], by_setting[False, 1.0]["late"]) == (0, parameters)
        assert (by_setting[False, 1e9]["early"], by_setting[False, 1e9]["late"]) == (0, 1)
        assert (by_setting[True, 1.0]["early"], by_setting[True, 1.0]["late"]) == (parameters, 0)
        assert (by_setting[True, 1e9]["early"], by_setting[True, 1e9]["late"]) == (1, 0)


@pytest.mark.dist
def test_one_gather_serves_a_block_and_starts_before_it_is_needed() -> None:
    for facts in run_on(2, "tests.dist.worker:prefetch_facts", {}):
        by_setting = {tuple(fact["setting"]): fact for fact in facts}
        blocks = facts[0]["blocks"]
        assert 1 < blocks < facts[0]["parameters"] / 4
        for policy in ("none", "full"):
            plain, ahead = by_setting[False, policy], by_setting[True, policy]
            assert plain["at_once"] == plain["gathers"]
            assert blocks < ahead["gathers"] == plain["gathers"] <= 2 * blocks
            assert ahead["at_once"] <= 0.3 * ahead["gathers"]
