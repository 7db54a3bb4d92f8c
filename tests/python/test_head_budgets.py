# SPDX-License-Identifier: Apache-2.0
"""Budgets of KV heads: exact sums, floors, limits, and the same numbers every time."""

import doctest
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixed_size_kv_cache import head_budgets as module
from fixed_size_kv_cache.head_budgets import head_budgets

errors = st.lists(st.lists(st.floats(0, 1e6), max_size=5), min_size=1, max_size=8).filter(any)


@given(errors, st.integers(1, 5000), st.floats(0, 1), st.one_of(st.none(), st.integers(0, 10_000)))
def test_the_average_is_exact_and_every_head_has_its_floor(errors, cache_size, floor, more):
    most = None if more is None else cache_size + more
    sizes = head_budgets(errors, cache_size, floor, most)
    assert [len(layer) for layer in sizes] == [len(layer) for layer in errors]
    every = [size for layer in sizes for size in layer]
    assert sum(every) == cache_size * len(every)
    assert min(every) >= max(1, int(floor * cache_size))
    assert most is None or max(every) <= most
    assert sizes == head_budgets(errors, cache_size, floor, most)


@given(errors, st.integers(8, 5000), st.floats(0, 1))
def test_more_error_is_never_a_smaller_size(errors, cache_size, floor):
    sizes = head_budgets(errors, cache_size, floor, 3 * cache_size)
    every = itertools.chain.from_iterable
    pairs = sorted(zip(every(errors), every(sizes), strict=True))
    assert all(b >= a - 1 for (_, a), (_, b) in itertools.pairwise(pairs))  # rounding: one token


def test_the_extra_is_in_proportion_to_the_error():
    assert head_budgets([[1.0, 2.0], [5.0, 0.0]], 1000, 0.2) == [[200 + 400, 200 + 800], [200 + 2000, 200]]


def test_what_a_full_head_leaves_goes_to_the_others_in_proportion():
    assert head_budgets([[1.0, 2.0, 100.0, 0.0]], 100, 0.1, 200) == [[10 + 57, 10 + 113, 200, 10]]


def test_full_heads_may_leave_something_to_those_without_an_error():
    assert head_budgets([[1.0, 0.0, 0.0]], 100, 0.1, 150) == [[150, 75, 75]]


@pytest.mark.parametrize("errors", [[[0.0, 0.0], [0.0]], [[2.0, 2.0], [2.0]]])
def test_equal_errors_are_equal_heads(errors):
    assert head_budgets(errors, 7) == [[7, 7], [7]]


def test_a_floor_of_all_is_equal_heads():
    assert head_budgets([[1.0, 9.0]], 50, 1.0) == [[50, 50]]


def test_ties_of_rounding_go_to_the_first():
    assert head_budgets([[1.0, 1.0, 1.0, 0.0]], 5, 0.2) == [[7, 6, 6, 1]]


def test_layers_without_a_cache_of_ours_have_no_sizes():
    assert head_budgets([[], [1.0, 1.0], []], 9) == [[], [9, 9], []]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (([[], []], 9), "errors must have at least one KV head; got none"),
        (([[1.0, -1.0]], 9), "errors must be finite and at least 0; got -1.0"),
        (([[1.0, float("nan")]], 9), "errors must be finite and at least 0; got nan"),
        (([[1.0]], 0), "cache_size must be a whole number of at least 1; got 0"),
        (([[1.0]], 2.5), "cache_size must be a whole number of at least 1; got 2.5"),
        (([[1.0]], 9, 1.5), "floor must be from 0 to 1; got 1.5"),
        (([[1.0]], 9, 0.5, 8), "max_tokens must be at least cache_size, 9, the average; got 8"),
    ],
)
def test_what_is_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=text):
        head_budgets(*arguments)


def test_the_example():
    assert doctest.testmod(module).failed == 0
