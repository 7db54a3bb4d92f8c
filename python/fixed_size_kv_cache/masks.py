# SPDX-License-Identifier: Apache-2.0
"""What an attention mask of transformers tells about the new tokens; nothing else of it is read.

After eviction the columns of a mask no longer belong to the slots of the cache, so who sees whom is decided by the
positions that the cache holds. Only which of the new tokens are padding has to come from outside.
"""

import torch
from torch import Tensor


def new_tokens_valid(mask: Tensor | None, Q: int, S: int) -> Tensor | None:
    """Which of the new tokens are real, as bool ``[B, Q]``; None where all are.

    Args:
        mask: None, ``[B, columns]`` with 1 for real tokens, or ``[B, 1, Q, columns]``, boolean (True: sees) or additive
            (0: sees). The columns end with the new tokens, or hold all tokens so far and perhaps some to come.
        Q: new tokens.
        S: tokens seen before them, padding included.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask[:, -Q:].bool()
    if mask.dim() != 4:
        raise ValueError(f"attention_mask must be [B, columns] or [B, 1, Q, columns]; got sizes {list(mask.shape)}")
    first = S if mask.shape[-1] >= S + Q else mask.shape[-1] - Q
    # A real token sees itself.
    diagonal = mask[:, 0, -Q:, first : first + Q].diagonal(dim1=-2, dim2=-1)
    return diagonal if diagonal.dtype == torch.bool else diagonal == 0
