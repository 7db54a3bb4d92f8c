# SPDX-License-Identifier: Apache-2.0
"""Buffers grow with what they hold, to the byte, and what they hold is that of a cache of full size."""

import copy
import weakref

import pytest
import torch
import transformers
from llamas import GREEDY, new_cache, recipe, tiny_llama, tokens
from packaging.version import Version
from steps import attend

from fixed_size_kv_cache.dynamic_cache import FixedSizeDynamicCache
from fixed_size_kv_cache.layer import slots as slots_module

SIZE = 12
SLOT = 2 * (4 + 4) * 4 + 2 * (4 + 1) * 4  # bytes of one slot of two KV heads: keys and values, facts and positions
REST = 4 + 8  # seen and columns
X = torch.randn(1, 8, 100, 4, generator=torch.Generator().manual_seed(0))


def addresses(cache) -> list[int]:
    return [x.data_ptr() for layer in cache.layers for x in layer.slots.tensors]


def bytes_of(capacity: int, B: int = 1) -> int:
    """Of so many slots and the free one."""
    return B * (capacity + 1) * SLOT + B * 4 + 8


def read(cache, *chunks: int) -> list[torch.Tensor]:
    outputs, start = [], cache.get_seq_length()
    for Q in chunks:
        outputs.append(attend(cache, X[:, :, start : start + Q]))
        start += Q
    return outputs


def test_memory_doubles_until_it_is_full():
    cache, seen = FixedSizeDynamicCache(cache_size=SIZE), []
    for _ in range(SIZE):
        read(cache, 1)
        seen.append(cache.nbytes)
    assert seen == [bytes_of(capacity) for capacity in (1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)]
    assert all(nbytes <= 2 * held * SLOT + REST for held, nbytes in enumerate(seen, start=1))
    at = addresses(cache)
    for Q in (1, 1, 5, 30, 1):
        read(cache, Q)
        assert cache.nbytes == bytes_of(SIZE) and addresses(cache) == at


@pytest.mark.parametrize(
    "chunks, capacity", [([5], 5), ([5, 1], 10), ([5, 6], 11), ([5, 3], 10), ([2, 9], 11), ([5, 30], 12), ([40], 12)]
)
def test_a_chunk_gets_what_it_needs(chunks, capacity):
    cache = FixedSizeDynamicCache(cache_size=SIZE)
    read(cache, *chunks)
    assert cache.nbytes == bytes_of(capacity)


def test_a_generous_size_costs_nothing():
    """131072 tokens of 8 rows would take 1.68 GB."""
    model = tiny_llama(torch.float32)
    with recipe():
        cache = new_cache(model, 131072)
        model.generate(tokens(8, 24), past_key_values=cache, max_new_tokens=2, **GREEDY)
    assert cache.get_seq_length() == 25
    slot = 8 * 4 * (2 * 8 * 4 + 5 * 4)  # 8 rows, 4 heads of 8
    assert cache.nbytes == 3 * (49 * slot + 8 * 4 + 8)
    assert cache.nbytes <= 3 * 25 * slot * 2


@pytest.mark.parametrize("settings", [{}, {"include_skipped": True}, {"policy": "streaming"}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 60, [5, 1, 1, 30, 1, 1, 1, 9, 1], [40, 1, 1]], ids=str)
def test_it_is_a_cache_of_full_size(chunks, settings):
    """Bit for bit: outputs, and all that is known of the tokens."""
    grown, full = (FixedSizeDynamicCache(cache_size=48, static=static, **settings) for static in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(read(grown, *chunks), read(full, *chunks), strict=True))
    held = grown.layers[0].tokens_held
    for x, y in zip(*(cache.layers[0].slots.read(held) for cache in (grown, full)), strict=True):
        assert torch.equal(x, y)


def test_what_is_empty_is_empty_after_growth():
    cache = FixedSizeDynamicCache(cache_size=SIZE)
    for Q in (3, 1, 1, 4, 1):
        read(cache, Q)
        slots = cache.layers[0].slots
        empty = slots.tokens.positions < 0
        assert empty[..., cache.layers[0].tokens_held :].all() and empty.sum() == 2 * (
            slots.capacity + 1 - cache.layers[0].tokens_held
        )
        assert torch.equal(empty, slots.tokens.scores == -torch.inf)


def test_static_has_its_full_size_at_once():
    cache = FixedSizeDynamicCache(cache_size=SIZE, static=True)
    read(cache, 1)
    at = addresses(cache)
    assert cache.nbytes == bytes_of(SIZE)
    read(cache, *[1] * 30, 20)
    assert addresses(cache) == at


@pytest.mark.skipif(not hasattr(transformers, "AttentionInterface"), reason="there generate() compiles no steps")
def test_steps_that_generate_compiles_have_the_full_size():
    cache = FixedSizeDynamicCache(config=tiny_llama().config, cache_size=SIZE)
    read(cache, 3)  # of the first of three layers
    cache.allow_compilation(True)
    assert cache.layers[0].nbytes == bytes_of(SIZE) and cache.layers[1].nbytes == 0
    cache.update(X[:, :2, :3], X[:, 2:4, :3], 1)
    assert cache.layers[1].nbytes == bytes_of(SIZE)


def test_rows_copies_and_resets_keep_what_there_is():
    cache = FixedSizeDynamicCache(cache_size=SIZE)
    read(cache, 3, 1)
    assert copy.deepcopy(cache).nbytes == cache.nbytes == bytes_of(6)
    cache.batch_repeat_interleave(3)
    assert cache.nbytes == bytes_of(6, B=3)
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(2)
    assert cache.nbytes == bytes_of(6)
    read(cache, *[1] * 5)
    assert cache.nbytes == bytes_of(SIZE)
    at = addresses(cache)
    cache.reset()
    read(cache, 20)
    assert cache.nbytes == bytes_of(SIZE) and addresses(cache) == at


def test_growth_in_inference_mode_can_be_written_outside_of_it():
    cache = FixedSizeDynamicCache(cache_size=SIZE)
    with torch.inference_mode():
        read(cache, 3, 1)
    read(cache, 1, 4, 1)
    assert not any(x.is_inference() for x in cache.layers[0].slots.tensors)


def test_a_chunk_that_grows_the_buffers_frees_the_old_first(monkeypatch):
    """Or there would be three caches and a chunk at once."""
    cache, alive = FixedSizeDynamicCache(cache_size=SIZE), []
    read(cache, 6)
    old = [weakref.ref(x) for x in cache.layers[0].slots.tokens]
    moved = slots_module._moved

    def watched(*args):
        alive.extend(x() is not None for x in old)
        return moved(*args)

    monkeypatch.setattr(slots_module, "_moved", watched)
    read(cache, 6)
    assert alive and not any(alive)


def test_no_room_to_grow_leaves_a_cache_that_can_be_reset(monkeypatch):
    cache = FixedSizeDynamicCache(cache_size=10**14)
    read(cache, 6)

    def full(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(slots_module, "_moved", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"cache_size must .* got 1000.*, of which 12 tokens of "):
            read(cache, 6)
    cache.reset()
    fresh = FixedSizeDynamicCache(cache_size=10**14)
    assert all(torch.equal(a, b) for a, b in zip(read(cache, 6, 1), read(fresh, 6, 1), strict=True))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="upstream counts on the host before transformers 5"
)
def test_the_first_compiled_step_makes_room_for_all():
    """One graph more than with static=True, and then addresses stay."""
    from fixed_size_kv_cache import enable

    model, ids = tiny_llama(), tokens(2, 60)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with enable(model, cache_size=16), torch.no_grad():
        cache, expected = (new_cache(model, 16) for _ in range(2))
        for each in (cache, expected):
            model(ids[:, :8], past_key_values=each)
        places = []
        for i in range(8, 60):
            step = dict(input_ids=ids[:, i : i + 1], position_ids=torch.full((2, 1), i))
            logits = compiled(**step, past_key_values=cache).logits
            torch.testing.assert_close(logits, model(**step, past_key_values=expected).logits, rtol=1e-9, atol=1e-9)
            places.append(addresses(cache))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert all(place == places[0] for place in places)
    assert torch.equal(cache.get_positions(2).sort().values, expected.get_positions(2).sort().values)
