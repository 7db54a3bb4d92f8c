# SPDX-License-Identifier: Apache-2.0
"""Memory and time per token of a long text. What the model writes means nothing past the length it was trained for."""

import resource

import pytest
import torch
import transformers
from llamas import new_cache, tiny_llama, tokens
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import FixedSizeDynamicCache, enable
from fixed_size_kv_cache.layer.attention import LogitRule

LENGTH, SIZE = 20_000, 64


def resident() -> int:
    """Most memory of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Watch(BaseStreamer):
    """Is called at each token of a generate(): what is allocated."""

    def __init__(self, cache: FixedSizeDynamicCache) -> None:
        self.cache, self.buffers, self.resident = cache, {}, {}

    def put(self, value: torch.Tensor) -> None:
        seen = self.cache.get_seq_length()
        if seen in (2 * SIZE, LENGTH // 2, LENGTH - 1):
            self.resident[seen] = resident()
            self.buffers[seen] = [(x.data_ptr(), x.nbytes) for layer in self.cache.layers for x in layer.slots.tensors]

    def end(self) -> None:
        pass


@pytest.mark.timeout(600)
def test_twenty_thousand_tokens_are_flat():
    """One layer, since each is flat for itself, and a wide one, so that what grows would show: 2 KiB for each token."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=64)
    sizes = dict(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, **heads)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=2 * LENGTH, eos_token_id=None)).eval()
    with enable(model, cache_size=SIZE):
        cache = new_cache(model, SIZE)
        watch = Watch(cache)
        model.generate(
            torch.ones(1, 1, dtype=torch.long),
            past_key_values=cache,
            max_new_tokens=LENGTH,
            do_sample=True,
            streamer=watch,
        )
    assert cache.get_seq_length() == LENGTH
    first, middle, last = watch.buffers.values()
    assert first == middle == last and len(first) >= 4
    assert watch.resident[LENGTH - 1] - watch.resident[2 * SIZE] < 30_000  # KiB; a stock cache would hold 41 MB


def test_a_prompt_is_read_without_a_square_of_it():
    """8192 tokens: their weights alone would take 2 GiB."""
    S, heads = 8192, 8
    x = torch.randn(1, 2 * heads, S, 8)
    before = resident()
    cache = FixedSizeDynamicCache(cache_size=SIZE)
    cache.update(x[:, :4], x[:, 4:8], 0)
    cache.attend(0, x[:, 8:], None, LogitRule(0.3))
    assert cache.get_held_tokens(0).eq(SIZE).all()
    assert (resident() - before) * 1024 < S * S * heads * 4 / 4


def test_a_long_prompt_keeps_two_caches_and_a_chunk():
    """What update() returns is all that attention reads: held tokens and a chunk."""
    model, widths = tiny_llama(), []
    with enable(model, cache_size=SIZE, prefill_chunk_size=100):
        cache = new_cache(model, SIZE)
        update = cache.update
        cache.update = lambda *args, **kwargs: (widths.append(args[0].shape[2]), update(*args, **kwargs))[1]
        model.generate(tokens(1, 900), past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert max(widths) == 100 and sum(widths) == 3 * 900
