# SPDX-License-Identifier: Apache-2.0
"""Why an attention and a cache do not fit. Each cause has a sentence of its own, looked for once a step has failed."""

from typing import Any

from ..compat.capability import text_config
from ..compat.transformers import CACHE_NAME
from ..layer import handoff
from .marks import LOCK, MODELS, NAME, RUNNING, enabled, enabled_with

ONCE = "enable the model once, before its threads start, or give each thread a model of its own"


def changed_attention(model: Any) -> str | None:
    """Of an enabled model whose attention is not ours any more."""
    cap, now = enabled(model), text_config(model.config)._attn_implementation
    if cap is None or not cap.has_effect or now == NAME:
        return None
    return (
        f'the attention of {type(model).__name__} was set to "{now}" after enable(), which had set it to "{NAME}"; '
        "call enable(model, ...) again, after set_attn_implementation"
    )


def why_no_report() -> str | None:
    """A step of our cache was followed by another attention than ours."""
    model = RUNNING.model
    if model is not None and enabled(model) is None and text_config(model.config)._attn_implementation != NAME:
        return (
            f"enable() of {type(model).__name__} ended in the midst of this generate(): disable() or the end of a "
            f"with block came from another thread; {ONCE}"
        )
    with LOCK:
        found = [changed_attention(each) for each in (*([] if model is None else [model]), *MODELS)]
    return next((cause for cause in found if cause is not None), None)


def why_foreign_cache(module: Any) -> str:
    """Our attention was given keys of a cache that is not ours."""
    config = getattr(module, "config", None)
    owners = enabled_with(config)
    if owners and not any(part is module for model in owners for part in model.modules()):
        return shared_config(owners[0])
    if RUNNING.model is not None and RUNNING.cache is not None:
        return (
            "the model went on with another cache than generate() had made, as PEFT's prefix tuning does, whose "
            "virtual tokens come in a stock one; call disable(model)"
        )
    if RUNNING.model is not None and any(RUNNING.model is model for model in owners):
        return (
            f"{type(RUNNING.model).__name__} was enabled in the midst of this generate(), by another thread, and the "
            f"cache is the one that it began with; {ONCE}"
        )
    if owners:
        return (
            "with gradients model(ids) returns transformers' own cache, and a stock cache stays one: call the model "
            "under torch.no_grad(), and let it make the cache, or pass FixedSizeDynamicCache(config=model.config)"
        )
    return f"call enable(model, cache_size=...), or pass {CACHE_NAME}=FixedSizeDynamicCache(config=model.config)"


def shared_config(owner: Any) -> str:
    return (
        f"it shares its config object with another model, a {type(owner).__name__}, for which enable() was called; "
        "enable this one too, or give it a config of its own, copy.deepcopy(model.config)"
    )


handoff.EXPLAIN = why_no_report
