# SPDX-License-Identifier: Apache-2.0
"""``profile_heads``: how much each KV head of a model loses when few tokens of a text are kept.

A model reads a text, is told to repeat it, and reads it again. In the second reading some heads look up what stood in
the first, each query elsewhere; most look at the same few tokens all the time. So a head's output with all tokens is
compared with that of a head that has kept few of the first reading, those that it attended to most. (Few for each
query, not for the head, would not do: who looks one thing up at a time would seem to need nothing.)
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..compat.capability import check_model, text_config
from ..compat.transformers import set_implementation
from ..dynamic_cache import FixedSizeDynamicCache, trained_positions
from ..head_profile import HeadProfile, hash_config
from ..layer.attention import QUERY_BLOCK, LogitRule, attend_with_weights, products_of
from ..layer.layer import FixedSizeLayer
from .attention_interface import UNKNOWN
from .profile_texts import INSTRUCTION, TEXTS
from .unwrapping import unwrap

NAME = "fsdc_profile"  # of the attention that records, as configs have it
LENGTH, KEPT = 600, 64


def profile_heads(
    model: Any,
    tokenizer_or_ids: Any = None,
    *,
    texts: Sequence[str] | None = None,
    length: int = LENGTH,
    kept: int = KEPT,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> HeadProfile:
    """Measures the *output error* of each KV head: what it loses when it keeps few tokens of a text.

    A text is read twice. The error is the mean square, over the tokens of the second reading, of how much the output of
    the attention layer changes when the head has kept only ``kept`` tokens of the first, over that of the output
    itself, added up over the query heads of the group; the mean over texts. A head with a large error needs many
    tokens. Neither labels nor gradients are needed. The same arguments give the same profile on the same machine.

    Args:
        model: what :func:`enable` takes; it is as before afterwards.
        tokenizer_or_ids: the model's tokenizer; or what is read instead of texts, token ids ``[L]`` or a list of such.
            None: random ids, which tell nearly as much.
        texts: what a tokenizer is given instead of two texts of our own, of which the first ``length`` tokens are read.
        length: tokens of a text at most, and at most half of what the model was trained to read.
        kept: how many tokens of the first reading a head keeps, those that it attends to most in the second.
        progress: what draws a bar around the layers, such as ``tqdm.tqdm`` or ``rich.progress.track``.

    Returns:
        A :class:`HeadProfile`.

    Raises:
        TypeError: for what is no model, and for ids that are not whole numbers.
        ValueError: for texts or ids with no more than ``kept`` tokens.
        NotImplementedError: for a model whose cache cannot be capped, or whose attention is not followed by a
            projection.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> profile = profile_heads(model, torch.arange(40), kept=8)
        >>> [len(layer) for layer in profile.output_error]
        [2]
    """
    model = unwrap(model, "profile_heads")
    check_model(model)
    if isinstance(kept, bool) or not isinstance(kept, int) or kept < 1:
        raise ValueError(f"profile_heads: kept must be a whole number of at least 1; got {kept!r}")
    readings = _read_arguments(model, tokenizer_or_ids, texts, length, kept)
    cached = FixedSizeDynamicCache(config=model.config, cache_size=kept).layers
    ours = [i for i, layer in enumerate(cached) if isinstance(layer, FixedSizeLayer)]
    steps = range(len(readings) * len(ours))
    recorder = _Recorder(set(ours), kept, iter(steps if progress is None else progress(steps)))
    config, single = text_config(model.config), _logits_of_one(model)
    before = config._attn_implementation
    set_implementation(config, NAME)
    RUNNING.recorder = recorder
    hooks = [part.register_forward_hook(recorder.see) for part in model.modules() if _has_matrix(part)]
    try:
        with torch.no_grad():
            for ids, queries in readings:
                recorder.queries = queries
                model(ids[None].to(model.device), use_cache=False, **single)
    finally:
        for hook in hooks:
            hook.remove()
        RUNNING.recorder = None
        set_implementation(config, before)
    for _ in recorder.steps:  # a bar ends with its last step
        pass
    missing = sorted(set(ours) - recorder.errors.keys())
    if missing:
        raise NotImplementedError(
            f"profile_heads: attention must be followed by a projection; got {type(model).__name__}, where layer "
            f"{missing[0]} has none"
        )
    errors = tuple(
        tuple((recorder.errors[i] / len(readings)).tolist()) if i in recorder.errors else () for i in range(len(cached))
    )
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    size = sum(weight.numel() for weight in model.parameters())
    return HeadProfile(name, size, hash_config(model.config), errors)


class _Running(threading.local):
    """What this thread is measuring."""

    recorder: "_Recorder | None" = None


RUNNING = _Running()


class _Recorder:
    """Adds up the errors of the heads, layer by layer as a model goes through them."""

    def __init__(self, layers: set[int], kept: int, steps: Iterator) -> None:
        self.layers, self.kept, self.steps = layers, kept, steps
        self.queries = 0  # the last tokens, those of the second reading
        self.errors: dict[int, Tensor] = {}  # float64 [H] of each layer, the sum over texts
        self._waiting: tuple | None = None  # attention whose projection has not run yet

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: LogitRule
    ) -> Tensor:
        """The output ``[B, Hq, Q, Dv]`` of a layer's attention, whose error counts once its projection is known."""
        first = query.shape[2] - self.queries
        outputs = []
        for start in range(0, first, QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, first))
            outputs.append(_attend(query[:, :, block], key, value, mask[:, :, block], rule)[0])
        second, weights = _attend(query[:, :, first:], key, value, mask[:, :, first:], rule)
        difference = second - _with_few(weights, value, first, self.kept).to(second.dtype)
        output = torch.cat([*outputs, second], dim=2)
        self._waiting = module, output, difference, key.shape[1]
        return output

    def see(self, part: nn.Module, arguments: tuple, _: Any) -> None:
        """A hook of what may be the projection after the attention of a layer: it is given all heads side by side, and
        is a part of the attention module or is given its output as it is."""
        if self._waiting is None or not arguments or not isinstance(arguments[0], Tensor):
            return
        module, output, difference, H = self._waiting
        B, Hq, Q, Dv = output.shape
        given = arguments[0]
        if given.numel() != output.numel() or given.shape[-1] != Hq * Dv:
            return
        if not any(part is own for own in module.modules()) and not torch.equal(
            given.reshape(B, Q, Hq, Dv), output.transpose(1, 2)
        ):
            return
        self._waiting = None
        identity = torch.eye(Hq * Dv, dtype=given.dtype, device=given.device)
        columns = part(identity) - part(torch.zeros_like(identity[:1]))  # [Hq * Dv, hidden], however they are stored
        columns = columns.double().view(Hq, Dv, -1)
        whole = torch.einsum("bhqd,hdo->bqo", output[:, :, -self.queries :].double(), columns).square().sum()
        lost = torch.stack([(difference[:, h].double() @ columns[h]).square().sum() for h in range(Hq)])
        errors = (lost / whole.clamp(min=1e-300)).view(H, -1).sum(-1).cpu()
        layer = module.layer_idx
        self.errors[layer] = self.errors[layer] + errors if layer in self.errors else errors
        next(self.steps, None)


def _has_matrix(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(part, nn.Embedding)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, Q, Dv]`` and weights ``[B, Hq, Q, S]``."""
    return attend_with_weights(query, products_of(query, key, rule), value, visible, rule)[:2]


def _with_few(weights: Tensor, value: Tensor, first: int, kept: int) -> Tensor:
    """The output ``[B, Hq, Q, Dv]`` of attention ``[B, Hq, Q, S]`` where each KV head has kept only ``kept`` of the
    tokens before ``first``: those with the most attention."""
    (B, Hq, Q, S), H = weights.shape, value.shape[1]
    weights = weights.view(B, H, -1, S)  # [B, H, G * Q, S]
    stays = torch.ones(B, H, 1, S, dtype=torch.bool, device=weights.device)
    stays[..., :first] = False
    stays.scatter_(3, weights[..., :first].sum(2, keepdim=True).topk(min(kept, first), dim=-1).indices, True)
    few = weights.masked_fill(~stays, 0)
    left = 1 - weights.sum(-1, keepdim=True) + few.sum(-1, keepdim=True)  # attention sinks keep theirs
    return (few @ value.to(few.dtype) / left).view(B, Hq, Q, -1)


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, Q, D]
    key: Tensor,  # [B, H, S, D]
    value: Tensor,  # [B, H, S, Dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [Hq]
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, which records what heads lose."""
    for argument in UNKNOWN:
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f"profile_heads: {type(module).__name__} must have no {argument}, which enable refuses"
            )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    recorder = RUNNING.recorder
    if module.layer_idx in recorder.layers:
        output = recorder.attend(module, query, key, value, attention_mask, LogitRule(scaling, softcap, s_aux))
        return output.transpose(1, 2).contiguous(), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=False)
    rule = LogitRule(scaling, softcap, s_aux)
    output = attend_with_weights(query, products_of(query, key, rule), value, attention_mask, rule)[0]
    return output.transpose(1, 2).contiguous(), None


def _mask(**kwargs: Any) -> Tensor:
    """Always one, ``[B, 1, Q, S]``, so that nobody has to know what it would be."""
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _read_arguments(
    model: Any, tokenizer_or_ids: Any, texts: Sequence[str] | None, length: int, kept: int
) -> list[tuple[Tensor, int]]:
    """What is read: ids ``[L]``, and how many at its end are the second reading."""
    between: list[int] = []
    if callable(tokenizer_or_ids):
        encode = tokenizer_or_ids
        rows = [encode(text, add_special_tokens=False)["input_ids"] for text in (TEXTS if texts is None else texts)]
        between = encode(INSTRUCTION, add_special_tokens=False)["input_ids"]
    elif texts is not None:
        raise TypeError("profile_heads: texts need the model's tokenizer; got none")
    elif tokenizer_or_ids is None:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(text_config(model.config).vocab_size, (length,), generator=generator) for _ in TEXTS]
    else:
        rows = tokenizer_or_ids if _is_list_of_rows(tokenizer_or_ids) else [tokenizer_or_ids]
    positions = trained_positions(model.config)
    longest = length if positions is None else min(length, (positions - len(between)) // 2)
    readings = []
    for row in rows:
        ids = torch.as_tensor(row)
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(
                f"profile_heads: tokenizer_or_ids must be a tokenizer, ids [L] or a list of such; got {ids.dtype} of "
                f"sizes {list(ids.shape)}"
            )
        ids = ids[:longest].cpu().long()
        if len(ids) <= kept:
            raise ValueError(
                f"profile_heads: what is read must have more than the {kept} tokens of kept; got {len(ids)}"
            )
        readings.append((torch.cat([ids, torch.tensor(between, dtype=torch.long), ids]), len(ids)))
    return readings


def _is_list_of_rows(ids: Any) -> bool:
    return isinstance(ids, (list, tuple)) and len(ids) > 0 and not isinstance(ids[0], int)


def _logits_of_one(model: Any) -> dict[str, int]:
    """Logits of all tokens would be the largest tensor of all, and nobody reads them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
