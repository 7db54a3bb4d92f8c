# SPDX-License-Identifier: Apache-2.0
"""Arguments that are nearly right: taken where there is no doubt, else refused in one plain sentence."""

import numpy as np
import pytest
import torch
from llamas import tiny_llama

from fixed_size_kv_cache import FixedSizeCacheConfig, FixedSizeDynamicCache

X = torch.ones(1, 4, 3, 8)


def test_the_model_instead_of_its_config():
    cache = FixedSizeDynamicCache(config=tiny_llama(), cache_size=12)
    assert cache.trained_positions == 1024


def test_the_size_as_second_argument():
    enabling = pytest.importorskip("fixed_size_kv_cache.huggingface.enabling", exc_type=ImportError)
    model = tiny_llama()
    with enabling.enable(model, 24) as handle, enabling.as_default(25) as default:
        assert (handle.settings.cache_size, default.settings.cache_size) == (24, 25)
    with pytest.raises(TypeError, match="cache_size must be a whole number; got FixedSizeCacheConfig"):
        enabling.enable(model, FixedSizeCacheConfig())


@pytest.mark.parametrize("number", [np.int64(24), np.int32(24), torch.tensor(24)], ids=["int64", "int32", "tensor"])
def test_whole_numbers_of_other_libraries(number):
    settings = FixedSizeCacheConfig(cache_size=number, sink_tokens=number - 22, recent_tokens=number - 20)
    assert (settings.cache_size, settings.sink_tokens, settings.recent_tokens) == (24, 2, 4)
    assert all(type(x) is int for x in (settings.cache_size, settings.sink_tokens, settings.recent_tokens))


@pytest.mark.parametrize("number", [24.0, "24", np.float32(24), True, np.bool_(True), {24}, "[24]"], ids=str)
def test_what_is_no_whole_number(number):
    with pytest.raises(TypeError, match="cache_size must be a whole number; got "):
        FixedSizeCacheConfig(cache_size=number)


def test_a_size_beyond_memory():
    cache = FixedSizeDynamicCache(cache_size=10**14, static=True)
    with pytest.raises(
        RuntimeError, match=r"cache_size must leave room in memory; got 100000000000000, of which .* need \d+ bytes"
    ):
        cache.update(X, X, 0)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "spans", [np.array([[2, 5]]), torch.tensor([[2, 5]]), [(np.int64(2), np.int64(5))], ((2, 5),), [[2, 5]]], ids=repr
)
def test_spans_of_other_libraries(spans):
    cache = FixedSizeDynamicCache(cache_size=24, protected_spans=spans)
    cache.update(X, X, 0)
    assert cache.layers[0].protected_spans == [[(2, 5)]]


@pytest.mark.parametrize(
    "spans",
    [5, "2-5", {2: 5}, {2, 5}, range(2, 5), [2, 5], [(2, 5, 6)], [slice(2, 5)], [(2.0, 5)], NotImplemented],
    ids=str,
)
def test_spans_of_odd_kinds(spans):
    with pytest.raises(TypeError, match="protected_spans must be "):
        FixedSizeDynamicCache(cache_size=24, protected_spans=spans)


@pytest.mark.parametrize("filled", [0, 3])
@pytest.mark.parametrize("Q", [1, 3])
def test_keys_and_values_that_differ(filled, Q):
    cache = FixedSizeDynamicCache(cache_size=24)
    if filled:
        cache.update(X, X, 0)
        cache.attend(0, X, None, rule())
    keys = X[:, :, :Q]
    for values in (X.repeat(1, 1, 2, 1)[:, :, : Q + 1], X[:, :2, :Q], X.repeat(2, 1, 1, 1)[:, :, :Q], X[0, :, :Q]):
        with pytest.raises(ValueError, match=r"update: (keys and values must be \[B, H, Q, D\]|new keys must be like)"):
            cache.update(keys, values, 0)
    cache.update(keys, keys, 0)  # nothing was staged
    assert cache.get_seq_length() == filled


def rule():
    from fixed_size_kv_cache.layer.attention import LogitRule

    return LogitRule(0.5)


@pytest.mark.parametrize("index", [-1, "0", None, 0.0, torch.tensor(0)], ids=str)
def test_layer_indices_that_are_none(index):
    cache = FixedSizeDynamicCache(config=tiny_llama().config, cache_size=24)
    with pytest.raises(TypeError, match="update: layer_idx must be a whole number of at least 0; got "):
        cache.update(X, X, index)


def test_settings_are_not_replaced_by_hand():
    cache = FixedSizeDynamicCache(cache_size=24)
    with pytest.raises(AttributeError, match=r"settings must not be replaced.*make another cache"):
        cache.settings = FixedSizeCacheConfig(cache_size=12)
    with pytest.raises(AttributeError, match="cannot assign to field 'cache_size'"):
        cache.settings.cache_size = 12
