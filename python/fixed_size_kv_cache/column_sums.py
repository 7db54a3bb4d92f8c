# SPDX-License-Identifier: Apache-2.0
"""What each token received from many queries: column sums of attention, in blocks of queries.

The output of that attention comes from elsewhere; here no matrix larger than a block is made.
"""

import torch
from torch import Tensor

from .attention import QUERY_BLOCK, LogitRule, Skipped, products_of, softmax
from .visibility import Visibility


def add_column_sums_(
    scores: Tensor,  # [B, H, T + Q] float32, in place
    query: Tensor,  # [B, Hq, Q, D]
    keys: Tensor,  # [B, H, T + Q, D]
    visibility: Visibility,
    rule: LogitRule,
    skipped: Skipped | None,
    query_weights: Tensor,  # [B, Q] float32
    carry: Tensor,  # [B] float32
) -> Tensor | None:
    """Adds the attention of the queries to the scores of their KV head, see ``accumulate_scores_``.

    Returns:
        The attention that went to the entry of the evicted tokens, ``[B, H]``, summed over queries and group; None
        without an entry.
    """
    (B, Hq, Q), H = query.shape[:3], keys.shape[1]
    lost = None
    for start in range(0, Q, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, Q)
        columns, visible = visibility.of_block(start, stop, keys.device)
        block = query[:, :, start:stop]
        products = products_of(block, keys[:, :, :columns], rule).view(B, H, Hq // H, stop - start, columns)
        weights, to_entry = softmax(products, block, visible, rule, skipped)
        torch.ops.fsdc.accumulate_scores_(
            scores[:, :, :columns],
            weights.reshape(B, Hq, stop - start, columns),
            query_weights[:, start:stop],
            carry if start == 0 else None,  # columns beyond the first block's are new tokens: nothing to decay
        )
        if to_entry is not None:
            votes = query_weights[:, None, None, start:stop, None] > 0
            lost = (0.0 if lost is None else lost) + (to_entry * votes).sum((2, 3, 4))
    return lost
