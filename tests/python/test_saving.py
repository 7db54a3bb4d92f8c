# SPDX-License-Identifier: Apache-2.0
"""A cache that was saved and loaded goes on bit for bit, and what is no such file is refused."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from llamas import GREEDY, feed, new_cache, recipe, tiny_llama, tokens
from steps import attend

from fixed_size_kv_cache import saving
from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache

HAS_INTERFACE = hasattr(transformers, "AttentionInterface")
needs_interface = pytest.mark.skipif(not HAS_INTERFACE, reason="enable() needs transformers 4.56")
X = torch.randn(2, 8, 60, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "text.safetensors"


def saved_and_loaded(cache, path, config=None):
    cache.save(path)
    assert os.listdir(path.parent) == [path.name]
    return FixedSizeDynamicCache.load(path, config=config)


def assert_same_layers(one, other) -> None:
    for layer, like in zip(one.layers, other.layers, strict=True):
        held = layer.tokens_held
        assert held == like.tokens_held and layer.tokens_seen == like.tokens_seen
        for x, y in zip(layer.slots.read(held), like.slots.read(held), strict=True):
            assert torch.equal(x, y)
        for x, y in zip(layer.slots.tensors[4:], like.slots.tensors[4:], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [12, 200])
def test_the_next_logits_and_all_later_evictions_are_the_same_bits(path, size, dtype):
    model, ids = tiny_llama(dtype), tokens(2, 60)
    with recipe():
        cache = new_cache(model, size)
        feed(model, cache, ids[:, :31], [30, 1])
        loaded = saved_and_loaded(cache, path, model)
        assert loaded.settings == cache.settings and repr(loaded) == repr(cache)
        for start, stop, chunks in ((31, 32, None), (32, 45, [13]), (45, 60, None)):
            new = ids[:, start:stop]
            assert torch.equal(feed(model, loaded, new, chunks), feed(model, cache, new, chunks))
            assert_same_layers(loaded, cache)


@pytest.mark.parametrize(
    "settings",
    [
        {"include_skipped": True},
        {"include_skipped": True, "skipped_mode": "sum"},
        {"policy": "streaming", "sink_tokens": 2},
        {"score_decay": 0.7, "score_prior": 0.3, "redundancy": 0.0, "value_weight": False, "static": True},
        {"protected_spans": [(3, 5), (11, 13)]},
        {"protected_spans": [[(3, 5)], [(4, 7)]]},
    ],
    ids=str,
)
def test_every_setting_comes_along(path, settings):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :4] = 0
    cache = FixedSizeDynamicCache(cache_size=12, **settings)
    attend(cache, X[:, :, :20], mask[:, :20])
    cache.reorder_cache(torch.tensor([1, 0]))
    loaded = saved_and_loaded(cache, path)
    assert loaded.settings == cache.settings
    assert_same_layers(loaded, cache)
    for start, stop in ((20, 21), (21, 30), (30, 31)):
        assert torch.equal(attend(loaded, X[:, :, start:stop]), attend(cache, X[:, :, start:stop]))
    assert_same_layers(loaded, cache)
    for each in (loaded, cache):
        each.reset()
    assert torch.equal(attend(loaded, X[:, :, :20]), attend(cache, X[:, :, :20]))
    assert_same_layers(loaded, cache)


def test_only_what_is_held_is_in_the_file(path):
    cache = FixedSizeDynamicCache(cache_size=100_000, static=True)
    attend(cache, X[:, :, :10])
    cache.save(path)
    assert path.stat().st_size < 10_000


@pytest.mark.parametrize("seen", [0, 3])
def test_an_empty_cache_and_one_that_is_not_full(path, seen):
    model, ids = tiny_llama(), tokens(1, 20)
    with recipe():
        cache = new_cache(model, 12)
        if seen:
            feed(model, cache, ids[:, :seen])
        loaded = saved_and_loaded(cache, path, model.config)
        assert loaded.get_seq_length() == seen
        assert torch.equal(feed(model, loaded, ids[:, seen:]), feed(model, cache, ids[:, seen:]))


def test_inference_mode_leaves_no_trace(path):
    with torch.inference_mode():
        cache = FixedSizeDynamicCache(cache_size=12, protected_spans=[(0, 2)])
        attend(cache, X[:, :, :20])
        loaded = saved_and_loaded(cache, path)
    assert torch.equal(attend(loaded, X[:, :, 20:21]), attend(cache, X[:, :, 20:21]))


@needs_interface
@pytest.mark.parametrize("family", ["gemma2", "qwen3_next", "gpt_oss"])
def test_windows_and_linear_layers_too(path, family):
    from test_mixed_models import tiny_model

    from fixed_size_kv_cache import enable

    model, ids = tiny_model(family), tokens(2, 30).clamp(max=90)
    with enable(model, cache_size=12), torch.no_grad():
        cache = new_cache(model, 12)
        feed(model, cache, ids[:, :20], [20])
        loaded = saved_and_loaded(cache, path, model.config)
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
        assert torch.equal(feed(model, loaded, ids[:, 20:]), feed(model, cache, ids[:, 20:]))
    with pytest.raises(ValueError, match="load: config must be given for a model with layers of transformers' own"):
        FixedSizeDynamicCache.load(path)


@needs_interface
def test_generate_goes_on_from_a_loaded_cache(path):
    """And still notices a text that is another one."""
    from fixed_size_kv_cache import enable

    model, ids = tiny_llama(), tokens(1, 20)
    with enable(model, cache_size=12):
        cache = new_cache(model, 12)
        first = model.generate(ids, past_key_values=cache, max_new_tokens=5, **GREEDY).sequences
        longer = torch.cat([first, tokens(1, 6, seed=3)], dim=1)
        cache.save(path)
        outputs = [
            model.generate(longer, past_key_values=each, max_new_tokens=9, output_logits=True, **GREEDY)
            for each in (FixedSizeDynamicCache.load(path, config=model), copy.deepcopy(cache))
        ]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        assert all(torch.equal(x, y) for x, y in zip(outputs[0].logits, outputs[1].logits, strict=True))
        edited = longer.clone()
        edited[0, 3] += 1
        with pytest.raises(ValueError, match="must begin with the 24 tokens that the cache has read"):
            model.generate(edited, past_key_values=FixedSizeDynamicCache.load(path, config=model), max_new_tokens=2)


# ---- what cannot be saved --------------------------------------------------------------------------------------------


def test_in_the_midst_of_a_step(path):
    cache = FixedSizeDynamicCache(cache_size=12)
    cache.update(X[:, :2, :5], X[:, 2:4, :5], 0)
    with pytest.raises(RuntimeError, match="save: a cache must be between two steps; got one in the midst of a step"):
        cache.save(path)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("count", [0, 2])
def test_while_recording(path, count):
    cache = FixedSizeDynamicCache(cache_size=12)
    attend(cache, X[:, :, :20])
    cache.activate_past_recording()
    if count:
        attend(cache, X[:, :, 20 : 20 + count])
    with pytest.raises(RuntimeError, match="save: tokens that may be taken back cannot be saved"):
        cache.save(path)
    cache.stop_past_recording()
    saved_and_loaded(cache, path)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    cache = FixedSizeDynamicCache(cache_size=12)
    attend(cache, X[:, :, :20])
    cache.save(path)
    before = path.read_bytes()
    attend(cache, X[:, :, 20:30])

    def half(tensors, file, metadata):
        Path(file).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        cache.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_without_safetensors(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    cache = FixedSizeDynamicCache(cache_size=12)
    with pytest.raises(ImportError, match=r"FixedSizeDynamicCache.save needs safetensors: pip install safetensors"):
        cache.save(path)
    with pytest.raises(ImportError, match=r"FixedSizeDynamicCache.load needs safetensors"):
        FixedSizeDynamicCache.load(path)


# ---- what cannot be loaded -------------------------------------------------------------------------------------------


def refuses(path, match, error=ValueError, config=None):
    with pytest.raises(error, match=match):
        FixedSizeDynamicCache.load(path, config=config)


@pytest.fixture
def file(path) -> Path:
    """Of a tiny LLaMA that has read 20 tokens."""
    model = tiny_llama()
    with recipe():
        cache = new_cache(model, 12)
        feed(model, cache, tokens(1, 20), [20])
    cache.save(path)
    return path


def rewrite(path: Path, change) -> None:
    """The same file with other metadata, and other tensors."""
    with safetensors.safe_open(path, framework="pt") as opened:
        about = json.loads(opened.metadata()[saving.NAME])
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    change(about, tensors)
    safetensors.torch.save_file(tensors, path, {saving.NAME: json.dumps(about)})


def test_no_file(path):
    refuses(path, "text.safetensors", FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 1000, b"x" * 1000])
def test_another_file(path, content):
    path.write_bytes(content)
    refuses(
        path, r"load: path must be a whole file that FixedSizeDynamicCache.save\(\) wrote; got '.*text.safetensors'"
    )


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {saving.NAME: "{"}, {saving.NAME: "[]"}, {saving.NAME: '{"format": 1}'}],
    ids=str,
)
def test_other_safetensors(path, metadata):
    safetensors.torch.save_file({"x": torch.ones(3)}, path, metadata)
    refuses(path, "load: path must be a file that .* wrote; got .*, a file of safetensors without a cache in it")


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.999])
def test_a_truncated_file(file, share):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refuses(file, "load: path must be a whole file .*, which is none or was cut off")


def test_a_newer_format(file):
    rewrite(file, lambda about, _: about.update(format=2, version="9.1"))
    refuses(
        file, r"must be of format 1 or older; got format 2, written by fixed_size_kv_cache 9.1; update this package"
    )


def test_settings_of_a_newer_version(file):
    rewrite(file, lambda about, _: about["settings"].update(magic=3))
    refuses(file, "load: settings must be known to this package, which is .*; got magic, written by")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_hidden_layers=4), "num_hidden_layers = 3; got 4"),
        (dict(num_key_value_heads=2), "num_key_value_heads = 4; got 2"),
        (dict(head_dim=16), "head_dim = 8; got 16"),
        (dict(vocab_size=101), "vocab_size = 100; got 101"),
    ],
    ids=str,
)
def test_another_model(file, change, words):
    config = copy.deepcopy(tiny_llama().config)
    for name, value in change.items():
        setattr(config, name, value)
    refuses(file, f"load: config must be that of the model whose cache was saved, with {words}", config=config)


def test_a_model_in_another_type(file):
    refuses(file, "with keys in torch.float64; got a model in torch.bfloat16", config=tiny_llama(torch.bfloat16))


def test_a_model_of_another_kind_of_layers(file):
    def as_window(about, _):
        about["layers"][1] = {"kind": "DynamicSlidingWindowLayer"}

    rewrite(file, as_window)
    words = "a layer 1 of kind DynamicSlidingWindowLayer; got fixed" if HAS_INTERFACE else "config must be given"
    refuses(file, words, config=tiny_llama().config)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("layers.1.keys"), "layer 1; keys must be .*; got absent"),
        (lambda t: t.pop("layers.1.seen"), r"layer 1; seen must be \[1\] of torch.int32; got absent"),
        (lambda t: t.update({"layers.0.extra": torch.ones(1)}), r"extra must be absent; got \[1\] of torch.float"),
        (lambda t: t.update({"layers.2.facts": torch.ones(4, 1, 4, 12).double()}), "facts must be .*float32; got .*64"),
        (lambda t: t.update({"layers.2.keys": torch.ones(1, 4, 9, 8)}), r"must be \[1, 4, 12, 8\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(file, change, words):
    rewrite(file, lambda _, tensors: (change(tensors), None)[1])
    refuses(file, f"load: path must hold what save\\(\\) wrote of .*{words}.*it was written by fixed_size_kv_cache")
