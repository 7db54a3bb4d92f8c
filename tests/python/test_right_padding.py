# SPDX-License-Identifier: Apache-2.0
"""Padding at the right or in the middle of a prompt: read as stock transformers reads it, and never stored."""

import pytest
import torch
import transformers
from llamas import GREEDY, assert_held_within, new_cache, tiny_llama, tokens

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache import enable

OPTIONS = dict(max_new_tokens=12, pad_token_id=0, output_logits=True, **GREEDY)
PADS = {"right": [slice(14, 20)], "middle": [slice(6, 11)], "both ends": [slice(0, 4), slice(17, 20)]}


def padded(pads: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    for part in pads:
        ids[1, part], mask[1, part] = 0, 0
    return ids, mask


@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
@pytest.mark.parametrize("settings", [{}, dict(include_skipped=True), dict(prefill_chunk_size=7)], ids=str)
def test_while_nothing_is_evicted_the_text_is_stocks(pads, settings):
    if "prefill_chunk_size" in settings and transformers.__version__ < "5":
        pytest.skip("upstream counts the padding")
    model, (ids, mask) = tiny_llama(), padded(pads)
    expected = model.generate(ids, attention_mask=mask, **OPTIONS)
    with enable(model, cache_size=64, **settings):
        out = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(out.sequences, expected.sequences)
    for one, other in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # float32, as generate() rounds them


def test_more_rows_of_padding_than_of_text():
    """A row whose last chunk is padding alone, and beams of it."""
    if transformers.__version__ < "5":
        pytest.skip("upstream counts the padding of chunks")
    model, (ids, mask) = tiny_llama(), padded([slice(3, 20)])
    for mode in (dict(num_beams=3), dict(prefill_chunk_size=5)):
        stock = {name: value for name, value in mode.items() if name != "prefill_chunk_size"}
        expected = model.generate(ids, attention_mask=mask, **OPTIONS, **stock).sequences
        with enable(model, cache_size=64):
            assert torch.equal(model.generate(ids, attention_mask=mask, **OPTIONS, **mode).sequences, expected)


@pytest.mark.parametrize("include_skipped", [False, True])
def test_padding_is_neither_stored_nor_votes(include_skipped):
    """The tokens held after a padded prompt are those of the text alone, and so are their scores."""
    model, (ids, mask) = tiny_llama(), padded(PADS["right"])
    held = []
    with enable(model), torch.no_grad():
        for given, shown in ((ids, mask), (ids[1:2, :14], None)):
            cache = new_cache(model, 10, include_skipped=include_skipped)
            model(given, attention_mask=shown, past_key_values=cache)
            assert_held_within(cache, 10)
            held.append(cache.layers[-1].slots)
    both, solo = held
    assert torch.equal(both.tokens.positions[1:2], solo.tokens.positions)
    torch.testing.assert_close(both.tokens.scores[1:2], solo.tokens.scores, rtol=1e-5, atol=1e-5)
    assert both.seen.tolist() == [20, 14, 20]
