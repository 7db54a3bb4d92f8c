# SPDX-License-Identifier: Apache-2.0
"""What a layer says of a step that does not fit it."""

from torch import Tensor

from . import handoff

NO_REPORT = (
    "{}: the attention of the previous step reported no scores to this cache, so it does not know what to keep. {}; "
    "after an error inside a step call reset()"
)
CALL_ENABLE = (
    "Call enable(model), use the forward of fixed_size_kv_cache.llama_attention, or call cache_truncate() after your "
    "attention"
)
HIDDEN = (
    "attention_mask must show new tokens all {} that the cache has read, padding apart: what was read cannot be hidden "
    "afterwards; give branches of a tree a copy of the cache each, and packed texts a row each"
)


def no_report(who: str) -> str:
    """The cause where it is known, else what to do."""
    return NO_REPORT.format(who, handoff.EXPLAIN() or CALL_ENABLE)


def sizes_differ(keys: Tensor, values: Tensor) -> str:
    if keys.dim() == 4 and keys.shape[2] == 0:
        return f"update: there must be at least one new token; got keys of sizes {list(keys.shape)}"
    return (
        f"update: keys and values must be [B, H, Q, D] of the same B, H and Q; got sizes {list(keys.shape)} and "
        f"{list(values.shape)}"
    )


def refuse_assignment(name: str, tensor: Tensor | None) -> None:
    if tensor is not None:  # transformers' own layers begin with None
        raise AttributeError(f"FixedSizeLayer: {name} must not be assigned, the cache writes its slots itself")
