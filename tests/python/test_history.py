# SPDX-License-Identifier: Apache-2.0
"""generate() on a cache with a history: what is handed over goes on from it, else it raises before the first token."""

import copy

import pytest
import torch
import transformers
from llamas import GREEDY, new_cache, tiny_llama, tokens

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import enable
from fixed_size_kv_cache.compat.transformers import CHUNKS_FORGET_EARLIER_TURNS, TAKES_NEW_TOKENS_ONLY
from fixed_size_kv_cache.layer.history import hash_ids

SIZES = [200, 12]  # nothing is evicted, and much


@pytest.fixture
def model():
    model = tiny_llama()
    model.forwards = 0
    model.register_forward_pre_hook(lambda *_: setattr(model, "forwards", model.forwards + 1))
    with enable(model, cache_size=200):
        yield model


def go(model, ids, cache, new=5, **kwargs):
    return model.generate(
        ids, past_key_values=cache, **{"max_new_tokens": new, "pad_token_id": 0, **GREEDY, **kwargs}
    ).sequences


def refuses(model, ids, cache, match, error=ValueError, **kwargs):
    before, seen = model.forwards, cache.get_seq_length()
    with pytest.raises(error, match=match):
        go(model, ids, cache, **kwargs)
    assert model.forwards == before and cache.get_seq_length() == seen


def full_mask(n, B=1):
    return torch.ones(B, n, dtype=torch.long)


@pytest.mark.parametrize("size", SIZES)
def test_new_tokens_only_need_a_mask_of_the_full_text(model, size):
    """Few and many of them; in one piece and in chunks."""
    cache = new_cache(model, size)
    first = go(model, tokens(1, 20), cache)  # 24 of its 25 tokens were read
    for count in (6, 40, 130):
        new = torch.cat([first[:, -1:], tokens(1, count, seed=9)], dim=1)
        words = (
            "must go on from the 24 tokens"
            if count == 6
            else "must begin with the 24 tokens .* are others in row 0; pass"
        )
        refuses(model, new, cache, words)
        if not CHUNKS_FORGET_EARLIER_TURNS:
            refuses(model, new, cache, words, prefill_chunk_size=16)
        for wrong in (24 + count, 26 + count):
            refuses(
                model,
                new,
                cache,
                "attention_mask must be as long|must be the full text",
                attention_mask=full_mask(wrong),
            )
    if not TAKES_NEW_TOKENS_ONLY:
        return
    twin = copy.deepcopy(cache)
    second = go(model, new, cache, attention_mask=full_mask(155))
    full = torch.cat([first, new[:, 1:]], dim=1)
    assert torch.equal(second[:, 131:], go(model, full, twin)[:, 155:])
    third = torch.cat([full, second[:, 131:], tokens(1, 3, seed=4)], dim=1)  # the history goes on from new tokens too
    assert torch.equal(go(model, third, cache), go(model, third, twin))


@pytest.mark.parametrize("size", SIZES)
def test_the_same_prompt_again_is_refused(model, size):
    cache = new_cache(model, size)
    ids = tokens(1, 60)
    go(model, ids, cache)
    refuses(model, ids, cache, r"must go on from the 64 tokens that the cache has read; got 60 tokens.*cache.crop")
    refuses(model, ids[:, :30], cache, "got 30 tokens")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("column", [0, 7, 23])
def test_an_edited_text_is_refused_and_the_true_one_is_not(model, size, column):
    cache = new_cache(model, size)
    first = go(model, tokens(1, 20), cache)
    longer = torch.cat([first, tokens(1, 9, seed=5)], dim=1)
    edited = longer.clone()
    edited[0, column] += 1
    refuses(model, edited, cache, "must begin with the 24 tokens that the cache has read")
    swapped = longer.clone()
    swapped[0, 3], swapped[0, 4] = longer[0, 4].item(), longer[0, 3].item() + (longer[0, 3] == longer[0, 4]).item()
    refuses(model, swapped, cache, "must begin with the 24 tokens")
    assert go(model, longer, cache).shape == (1, 39)


def test_rows_have_histories_of_their_own(model):
    """Left padding, rows repeated and picked, a copy."""
    ids, mask = tokens(2, 20), full_mask(20, 2)
    ids[0, :6], mask[0, :6] = 0, 0
    cache = new_cache(model, 200)
    first = go(model, ids, cache, attention_mask=mask)
    longer = torch.cat([first, tokens(2, 5, seed=5)], dim=1)
    mask = torch.cat([mask, full_mask(10, 2)], dim=1)
    swapped = longer[[1, 0]]
    refuses(model, swapped, cache, "are others in row 0", attention_mask=mask)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    refuses(model, longer, cache, "must show the tokens|are others in row 0", attention_mask=mask)
    stock = model_of_stock().generate(swapped, attention_mask=mask[[1, 0]], max_new_tokens=5, pad_token_id=0, **GREEDY)
    assert torch.equal(go(model, swapped, copy.deepcopy(cache), attention_mask=mask[[1, 0]]), stock.sequences)
    refuses(model, longer[:1], cache, "must have the 2 rows of the cache; got 1 ", attention_mask=mask[:1])


def model_of_stock():
    return tiny_llama()


def test_a_mask_may_not_hide_what_was_read(model):
    """A row that ended early: its padding was read as tokens. And padding that moved."""
    ids, mask = tokens(2, 20), full_mask(20, 2)
    ids[0, :6], mask[0, :6] = 0, 0
    cache = new_cache(model, 200)
    longer = torch.cat([go(model, ids, cache, attention_mask=mask), tokens(2, 5, seed=5)], dim=1)
    mask = torch.cat([mask, full_mask(10, 2)], dim=1)
    hidden, shown, moved = mask.clone(), mask.clone(), mask.clone()
    hidden[1, 22:24], shown[0], moved[0] = 0, 1, mask[0].roll(1)
    refuses(model, longer, cache, "got 22 of 24 columns shown in row 1, of which 24 were read", attention_mask=hidden)
    refuses(model, longer, cache, "got 24 of 24 columns shown in row 0, of which 18 were read", attention_mask=shown)
    refuses(model, longer, cache, "are others in row 0", attention_mask=moved)
    assert go(model, longer, cache, attention_mask=mask).shape == (2, 35)


def test_a_cache_filled_by_forwards_is_judged_by_lengths_only(model):
    ids = tokens(1, 60)
    cache = new_cache(model, 200)
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
    refuses(model, ids[:, :50], cache, "must go on from the 50 tokens")
    other = torch.cat([tokens(1, 50, seed=3), ids[:, 50:]], dim=1)
    assert go(model, other, copy.deepcopy(cache)).shape == (1, 65)
    with torch.no_grad():  # after generate() too
        out = go(model, ids, cache)
        model(tokens(1, 3), past_key_values=cache)
    assert go(model, torch.cat([out, tokens(1, 9)], dim=1), cache).shape == (1, 79)


def test_tokens_taken_back_are_no_history(model):
    cache = new_cache(model, 200)
    first = go(model, tokens(1, 20), cache)
    cache.crop(20)
    edited = torch.cat([first[:, :20], tokens(1, 9, seed=5)], dim=1)
    assert torch.equal(go(model, edited, cache), go(model, edited, new_cache(model, 200)))
    cache.reset()
    assert go(model, tokens(1, 5), cache).shape == (1, 10)


def test_an_error_in_the_middle_leaves_no_history(model):
    cache = new_cache(model, 200)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        go(model, tokens(1, 20), cache, stopping_criteria=[stop])
    assert cache.layers[0].history is None


@pytest.mark.parametrize(
    "mode", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)], ids=["beams", "samples"]
)
def test_several_rows_for_each_prompt(model, mode):
    """Samples are rows with a history; beams are not what was returned."""
    cache = new_cache(model, 200)
    out = go(model, tokens(1, 20), cache, **mode)
    assert (cache.layers[0].history is None) == ("num_beams" in mode)
    if "num_beams" not in mode:
        refuses(model, out.roll(1, 0)[:, :24].repeat(1, 2), cache, "are others in row", num_return_sequences=1)


ASSISTED = {
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "assistant": "assistant",
    "early exit": dict(assistant_early_exit=1),
}


@pytest.mark.parametrize("mode", ASSISTED.values(), ids=ASSISTED)
@pytest.mark.parametrize("size", SIZES)
def test_assisted_decoding_on_a_cache_with_history(mode, size):
    """The tokens of earlier turns are read once; the text is stock's while nothing is evicted."""
    model = tiny_llama()
    assistant = {}
    if mode == "assistant":
        mode = assistant = dict(assistant_model=copy.deepcopy(model))
    options = dict(eos_token_id=99)
    method = model.prepare_inputs_for_generation
    with enable(model, cache_size=size):
        if assistant:
            enable(assistant["assistant_model"], cache_size=size)
        cache = new_cache(model, size)
        text = go(model, tokens(1, 30), cache, 10, **options)
        for seed in (3, 4):
            longer = torch.cat([text, tokens(1, 4, seed=seed)], dim=1)
            text = go(model, longer, cache, 10, attention_mask=full_mask(longer.shape[1]), **options, **mode)
            assert cache.get_seq_length() == text.shape[1] - 1
            refuses_again = longer[:, : cache.get_seq_length()]
            with pytest.raises(ValueError, match="must go on from"):
                go(model, refuses_again, cache, 10, **options, **mode)
    assert model.prepare_inputs_for_generation == method
    if size == 200:
        options |= dict(attention_mask=full_mask(longer.shape[1]), max_new_tokens=10, pad_token_id=0)
        expected = tiny_llama().generate(longer, **options, **GREEDY).sequences
        assert torch.equal(text, expected)
    else:
        assert cache.get_held_tokens(0).max() <= size


def test_the_hash():
    ids, real = tokens(4, 300), torch.rand(4, 300) < 0.8
    whole = hash_ids(ids, real, 0)
    parts = hash_ids(ids[:, :123], real[:, :123], 0) + hash_ids(ids[:, 123:], real[:, 123:], 123)
    assert torch.equal(whole, parts)
    assert torch.equal(whole, hash_ids(ids.masked_fill(~real, 7), real, 0))  # what padding holds means nothing
    many = torch.cat([hash_ids(torch.randint(0, 3, (1000, 12)), None, start) for start in range(3)])
    texts = torch.randint(0, 50000, (5000, 8))
    assert len(set(hash_ids(texts, None, 0).tolist())) == len({tuple(row) for row in texts.tolist()})
    assert many.dtype == torch.int64
