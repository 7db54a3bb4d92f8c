# SPDX-License-Identifier: Apache-2.0
"""Which token ids a cache has read, as one number for each row: enough to notice a text that is another one."""

from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -1  # the id that a column of padding counts as


class History(NamedTuple):
    """What was read up to some length. Tokens that came after it from elsewhere make it worthless."""

    tokens: int  # columns, padding included
    hashes: Tensor  # int64 [B], on the CPU

    def select_rows(self, rows: Tensor) -> "History":
        """With these rows of the batch, ``[rows]`` int64."""
        return self._replace(hashes=self.hashes.index_select(0, rows.cpu()))


def hash_ids(ids: Tensor, real: Tensor | None, start: int) -> Tensor:
    """A hash of the ids ``[B, L]`` in columns ``start`` on, int64 ``[B]``; those of consecutive parts add up.

    Args:
        ids: whole numbers.
        real: bool ``[B, L]``, False for padding, whose ids mean nothing; None: all.
        start: the column of the first.
    """
    ids = ids.long() if real is None else ids.long().masked_fill(~real, PADDING)
    columns = torch.arange(start, start + ids.shape[1], device=ids.device)
    mixed = (ids + 1) * -0x61C8864680B583EB + (columns + 1) * -0x3D4D51C2D82B14B1  # odd; int64 wraps around
    for shift, factor in ((32, 0x2127599BF4325C37), (29, -0x77A9B8C7D6E5F403)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 32)).sum(-1).cpu()
