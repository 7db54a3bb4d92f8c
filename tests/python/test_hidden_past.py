# SPDX-License-Identifier: Apache-2.0
"""A mask that hides tokens which were read before: it raises, in prefill and in a decode step; others do not."""

import pytest
import torch
import transformers
from llamas import GREEDY, new_cache, tiny_llama, tokens

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import enable

HIDDEN = r"attention_mask must show new tokens all 8 tokens that the cache has read.*a copy of the cache each"


@pytest.fixture
def model():
    model = tiny_llama()
    with enable(model, cache_size=64), torch.no_grad():
        yield model


def filled(model, size=64, B=2, mask=None):
    cache = new_cache(model, size)
    model(tokens(B, 8), past_key_values=cache, attention_mask=mask)
    return cache


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("size", [64, 6])
@pytest.mark.parametrize("Q", [1, 3])
@pytest.mark.parametrize("form", ["2-D", "4-D", "additive"])
def test_zeros_over_old_tokens_raise(model, form, Q, size):
    for hidden in (0, 5, 7):
        if form == "2-D":
            mask = torch.ones(2, 8 + Q, dtype=torch.long)
            mask[1, hidden] = 0
        else:
            mask = torch.ones(2, 1, Q, 8 + Q, dtype=torch.bool).tril(8)
            mask[1, 0, -1, hidden] = False
            mask = mask if form == "4-D" else additive(mask)
        cache = filled(model, size)
        with pytest.raises(ValueError, match=HIDDEN):
            model(tokens(2, Q, seed=3), past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("Q", [1, 3])
def test_masks_that_hide_nothing_are_as_no_mask(model, Q):
    new = tokens(2, Q, seed=3)
    expected = model(new, past_key_values=filled(model)).logits
    causal = torch.ones(2, 1, Q, 8 + Q, dtype=torch.bool).tril(8)
    masks = [
        torch.ones(2, 8 + Q, dtype=torch.long),
        torch.ones(2, 8 + Q + 4, dtype=torch.long),
        causal,
        additive(causal),
        causal[:1],
    ]
    for mask in masks:
        assert torch.equal(model(new, past_key_values=filled(model), attention_mask=mask).logits, expected)


@pytest.mark.parametrize("Q", [1, 3])
def test_padding_is_no_hidden_token(model, Q):
    """Left padding, padding among the new tokens; and a mask that shows the padding after all."""
    mask = torch.ones(2, 8 + Q, dtype=torch.long)
    mask[0, :3] = 0
    for more in (None, 8):
        if more is not None:
            mask[1, more] = 0
        model(tokens(2, Q, seed=3), past_key_values=filled(model, mask=mask[:, :8]), attention_mask=mask)
    cache = filled(model, mask=mask[:, :8])
    mask[0, 2] = 1
    with pytest.raises(ValueError, match=HIDDEN):
        model(tokens(2, Q, seed=3), past_key_values=cache, attention_mask=mask)


def test_branches_of_a_tree_raise(model):
    see = torch.ones(8, 8, dtype=torch.bool).tril()
    see[6:, 4:6] = False  # 4 shared, branch A 4-5, branch B 6-7
    later = torch.zeros(2, 10, dtype=torch.bool)
    later[0, [0, 1, 2, 3, 4, 5, 8]] = True
    later[1, [0, 1, 2, 3, 6, 7, 9]] = True
    cache = new_cache(model, 64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]])
    model(tokens(1, 8), attention_mask=see[None, None], position_ids=positions, past_key_values=cache)
    with pytest.raises(ValueError, match=HIDDEN):
        model(
            tokens(1, 2), attention_mask=later[None, None], position_ids=torch.tensor([[6, 6]]), past_key_values=cache
        )


def test_while_tokens_may_be_taken_back(model):
    cache = filled(model)
    cache.activate_past_recording()
    model(tokens(2, 3), past_key_values=cache, attention_mask=torch.ones(2, 11, dtype=torch.long))
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, 9] = 0
    with pytest.raises(ValueError, match="all 11 tokens"):
        model(tokens(2, 2), past_key_values=cache, attention_mask=mask)


def test_generate_looks_once(model, monkeypatch):
    """Its decode steps add nothing; and a forward after it looks again."""
    from fixed_size_kv_cache.layer import layer

    calls = []
    original = layer.hides_the_past
    monkeypatch.setattr(layer, "hides_the_past", lambda *args: calls.append(1) or original(*args))
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    cache = new_cache(model, 64)
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, pad_token_id=0, **GREEDY)
    assert not calls
    model(
        ids[:, :1], attention_mask=torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1), past_key_values=cache
    )
    assert len(calls) == 1  # for all layers
