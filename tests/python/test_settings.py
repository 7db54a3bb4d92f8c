# SPDX-License-Identifier: Apache-2.0
"""What a cache is told: arguments and environment variables."""

import math
import types

import pytest
import torch
from llamas import tiny_llama

import fixed_size_kv_cache
from fixed_size_kv_cache.compat import versions as _versions
from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.settings import FixedSizeCacheConfig


def test_enable_on_an_older_transformers_says_which_it_needs(monkeypatch):
    monkeypatch.setattr(_versions, "transformers_version", lambda: "4.53.0")
    with pytest.raises(ImportError, match=r"enable needs transformers>=4.56.2; got 4.53.0, on which the recipe"):
        fixed_size_kv_cache.enable  # noqa: B018


def test_a_positional_config_is_refused_with_the_right_form():
    with pytest.raises(TypeError, match=r"FixedSizeDynamicCache\(config=model.config, cache_size=1024\)"):
        FixedSizeDynamicCache(tiny_llama().config)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="got budget"):
        FixedSizeDynamicCache(budget=3)


@pytest.mark.parametrize(
    "settings, error, text",
    [
        (dict(cache_size=0), ValueError, "cache_size must be at least 1; got 0"),
        (dict(cache_size=1, include_skipped=True), ValueError, "cache_size must be at least 2; got 1"),
        (dict(cache_size=1.5), TypeError, "cache_size must be a whole number; got 1.5"),
        (dict(include_skipped="False"), TypeError, "include_skipped must be True or False; got 'False'"),
        (dict(cache_size=True), TypeError, "cache_size must be a whole number; got True"),
        (
            dict(cache_size=8, sink_tokens=4, recent_tokens=5),
            ValueError,
            "at most the 8 tokens that are held; got 4 ",
        ),
        (dict(sink_tokens=-1), ValueError, "sink_tokens must be at least 0; got -1"),
        (dict(score_decay=0.0), ValueError, "score_decay must be above 0 and at most 1; got 0.0"),
        (dict(score_decay="x"), TypeError, "score_decay must be a number; got 'x'"),
        (dict(redundancy=None), TypeError, "redundancy must be a number; got None"),
        (dict(score_prior=-0.1), ValueError, "score_prior must be at least 0 and finite; got -0.1"),
        (dict(score_prior=math.nan), ValueError, "score_prior must be at least 0 and finite; got nan"),
        (dict(score_decay=math.nan), ValueError, "score_decay must be above 0"),
        (dict(redundancy=1.1), ValueError, "redundancy must be from 0 to 1; got 1.1"),
        (dict(policy="lru"), ValueError, "policy must be one of attention, streaming, random; got 'lru'"),
        (dict(skipped_mode="max"), ValueError, "skipped_mode must be one of mean, sum; got 'max'"),
    ],
)
def test_settings_out_of_range(settings, error, text):
    with pytest.raises(error, match=text):
        FixedSizeDynamicCache(**settings)


@pytest.mark.parametrize(
    "size, sinks, recent, decay",
    [(1, 0, 0, 0.5), (2, 0, 0, 0.5), (9, 0, 2, 1 - 4 / 9), (50, 2, 12, 1 - 4 / 50), (1024, 4, 256, 1 - 4 / 1024)],
)
def test_default_settings(size, sinks, recent, decay):
    made = FixedSizeCacheConfig(cache_size=size)
    assert (made.sink_tokens, made.recent_tokens, made.score_decay) == (sinks, recent, decay)


@pytest.mark.parametrize("text, value", [(" 7 ", 7), ("2048", 2048)])
def test_size_from_the_environment(text, value, monkeypatch):
    monkeypatch.setenv("FSDC_KV_CACHE_SIZE", text)
    assert FixedSizeDynamicCache().settings.cache_size == value
    assert FixedSizeDynamicCache(cache_size=5).settings.cache_size == 5  # what is said wins


@pytest.mark.parametrize("text", ["1e3", "-1", "0", "", " ", "1_000", "ten", "2.0", "٣"])
def test_size_from_the_environment_is_read_strictly(text, monkeypatch):
    monkeypatch.setenv("FSDC_KV_CACHE_SIZE", text)
    with pytest.raises(ValueError, match=f"FSDC_KV_CACHE_SIZE must be a whole number of at least 1; got {text!r}"):
        FixedSizeDynamicCache()


@pytest.mark.parametrize("name", ["FSDC_INCLUDE_SKIPPED", "FSDC_FREE_MEMORY"])
def test_switches_from_the_environment(name, monkeypatch):
    setting = name.removeprefix("FSDC_").lower()
    for text, value in {"True": 1, "FALSE": 0, " yes ": 1, "no": 0, "1": 1, "0": 0, "On": 1, "off": 0}.items():
        monkeypatch.setenv(name, text)
        assert getattr(FixedSizeDynamicCache().settings, setting) is bool(value)
        assert getattr(FixedSizeDynamicCache(**{setting: True}).settings, setting) is True
    for text in ("", "2", "enabled", "None"):
        monkeypatch.setenv(name, text)
        with pytest.raises(ValueError, match=f"{name} must be true, false, 1, 0, yes, no, on or off; got {text!r}"):
            FixedSizeDynamicCache()


def test_memory_is_freed_once_per_forward_and_never_in_a_decode_step(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("freed"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cache = FixedSizeDynamicCache(cache_size=8, free_memory=True)
    cache.last_layer = 2
    cache.layers = [types.SimpleNamespace(device=torch.device("cuda")) for _ in range(3)]
    for queries, expected in ((20, 1), (1, 0)):
        calls.clear()
        for layer_idx in range(3):
            cache._free_memory(layer_idx, queries)
        assert len(calls) == expected
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cache._free_memory(2, 20)
    assert not calls
