# SPDX-License-Identifier: Apache-2.0
"""What is read from a mask, in every form that a version of transformers makes."""

import pytest
import torch

from fixed_size_kv_cache.layer.new_tokens import read_mask

PADS = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)  # two rows of four new tokens
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril() & PADS[:, None, :]  # [2, 4, 4]; rows of padding see nothing


def test_none_says_that_all_are_real():
    assert read_mask(None, 2, 4, 0) == (None, None)


@pytest.mark.parametrize("older", [1, 0])  # whatever a mask says about older tokens
@pytest.mark.parametrize("S, to_come", [(0, 0), (3, 0), (3, 5)])
def test_two_dimensions(S, to_come, older):
    mask = torch.cat([torch.full((2, S), older), PADS, torch.zeros(2, to_come)], dim=1).long()
    assert torch.equal(read_mask(mask, 2, 4, S).valid, PADS)


@pytest.mark.parametrize("before, S", [(0, 0), (5, 5), (5, 90)], ids=["empty", "full width", "width of what is held"])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("older", [True, False])
def test_four_dimensions(before, S, additive, older):
    mask = torch.cat([torch.full((2, 4, before), older), CAUSAL], dim=-1)[:, None]
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    new = read_mask(mask, 2, 4, S)
    assert torch.equal(new.valid, PADS)
    assert torch.equal(new.sees, CAUSAL)


def test_full_width_and_one_column_too_many():
    """4.48 without a 2-D mask."""
    mask = torch.cat([torch.ones(2, 4, 5, dtype=torch.bool), CAUSAL, torch.zeros(2, 4, 1, dtype=torch.bool)], dim=-1)
    assert torch.equal(read_mask(mask[:, None], 2, 4, 5).valid, PADS)


def test_rows_of_padding_that_were_shown_everything():
    """4.48 on CUDA."""
    unmasked = torch.where(CAUSAL.any(-1, keepdim=True), CAUSAL, True)
    assert torch.equal(read_mask(unmasked[:, None], 2, 4, 0, shows_padding_everything=True).valid, PADS)


def test_a_batch_of_one_stands_for_all_rows():
    assert read_mask(CAUSAL[1:, None], 3, 4, 0).valid.shape == (3, 4)


@pytest.mark.parametrize("mask, error", [("block mask", TypeError), (torch.ones(2, 4, 4), ValueError)])
def test_other_masks_are_refused(mask, error):
    with pytest.raises(error, match="attention_mask must be"):
        read_mask(mask, 2, 4, 0)
