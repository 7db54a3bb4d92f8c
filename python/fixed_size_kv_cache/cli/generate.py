# SPDX-License-Identifier: Apache-2.0
"""``fsdc generate``: text from any decoder-only model, with a cache of fixed size."""

import inspect
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from ..compat.capability import reads_in_one_piece
from ..compat.transformers import CACHE_NAME, DynamicLayer
from ..compat.versions import OLDEST_INTERFACE, has_interface
from ..dynamic_cache import FixedSizeDynamicCache
from ..layer.layer import FixedSizeLayer
from ..recall import MODEL, one_thread
from ..settings import FixedSizeCacheConfig
from .load_model import Refused, learned_positions, load, load_profile, one_line

CHUNK = 512  # tokens of a prompt that are read at a time, at least
# What torch's allocators say, of the CPU and of CUDA; only the latter has a class of its own.
OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed")


@dataclass
class Written:
    """What one model wrote."""

    tokens: list[int]
    text: str
    tokens_seen: int
    tokens_held: int  # by a KV head, on average
    heads_differ: bool
    cache_bytes: int
    full_cache_bytes: int
    tokens_per_second: float

    def line(self) -> str:
        on_average = " on average" if self.heads_differ else ""
        return (
            f"{self.tokens_seen} tokens seen, {self.tokens_held} held by each layer and KV head{on_average}; "
            f"cache {decimal(self.cache_bytes)} allocated, in full {decimal(self.full_cache_bytes)}; "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


def encode(tokenizer: Any, prompt: str, chat: bool, embedded: bool) -> Tensor:
    """The prompt as ids ``[1, Q]``."""
    if not prompt or (embedded and not prompt.strip()):
        raise Refused("the prompt must have at least one token; got none")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise Refused("--chat needs a model with a chat template; this tokenizer has none")
        turns = [{"role": "user", "content": prompt}]
        try:
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever the template says
            raise Refused(f"--chat: the chat template refuses this turn: {error}") from error
    elif embedded:
        prompt = f"{tokenizer.bos_token} {prompt}"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
    if ids.shape[1] == 0:
        raise Refused("the prompt must have at least one token; got none")
    if embedded:
        words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(prompt)]
        if unknown := sorted(set(words) - tokenizer.get_vocab().keys()):
            raise Refused(
                f"the embedded model knows the {len(tokenizer)} words in {MODEL / 'tokenizer.json'}; not "
                f"{', '.join(unknown)}. Try 'the code of maple is 47 . what is the code of maple ?', or another --model"
            )
    return ids


def write(model: Any, tokenizer: Any, ids: Tensor, cache: Any, max_new_tokens: int, show: bool) -> Written:
    """Reads the prompt in chunks and generates greedily; ``show`` streams the text to stdout."""
    ids = ids.to(model.device)
    with torch.inference_mode():
        _read(model, ids[:, :-1], cache)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        began = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE_NAME: cache},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        seconds = time.perf_counter() - began
    new = out[0, ids.shape[1] :].tolist()
    held, now, full = tokens_and_bytes(cache)
    return Written(
        tokens=new,
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens_seen=cache.get_seq_length(),
        tokens_held=sum(held) // len(held),
        heads_differ=len(set(held)) > 1,
        cache_bytes=now,
        full_cache_bytes=full,
        tokens_per_second=len(new) / seconds,
    )


def tokens_and_bytes(cache: Any) -> tuple[list[int], int, int]:
    """Tokens of each KV head that could grow, and bytes: all that the cache has allocated, and the keys and values if
    nothing were evicted. Layers with a window, or without keys, are the same in both."""
    held, now, full = [], 0, 0
    for layer in cache.layers:
        if isinstance(layer, FixedSizeLayer):
            heads = (layer.positions[0] >= 0).sum(-1).tolist()
            per_token = sum(
                x.shape[-1] * x.element_size() for x in (layer.slots.tokens.keys, layer.slots.tokens.values)
            )
            held += heads
            full += len(heads) * cache.get_seq_length() * per_token
        elif getattr(layer, "keys", None) is not None and layer.keys.numel():
            if type(layer) is DynamicLayer:
                held += [layer.keys.shape[2]] * layer.keys.shape[1]
            now += layer.keys.nbytes + layer.values.nbytes
            full += layer.keys.nbytes + layer.values.nbytes
    return held, cache.nbytes if isinstance(cache, FixedSizeDynamicCache) else now, full


def first_difference(ours: list[int], full: list[int]) -> int | None:
    """The first place where two texts differ, None where they are the same."""
    places = (at for at, pair in enumerate(zip(ours, full, strict=False)) if pair[0] != pair[1])
    return next(places, None if len(ours) == len(full) else min(len(ours), len(full)))


def _read(model: Any, ids: Tensor, cache: Any) -> None:
    """Reads all of a prompt ``[1, Q]`` but its last token, where it may be cut; a long one with progress on stderr."""
    if reads_in_one_piece(model.config):
        return
    chunk = CHUNK
    if isinstance(cache, FixedSizeDynamicCache):
        chunk = max(chunk, cache.settings.average_size)
    can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if can_skip else {}  # nobody looks at the logits of a prompt
    with progress(ids.shape[1], hidden=ids.shape[1] <= chunk) as advance:
        for part in ids.split(chunk, dim=1):
            if part.shape[1]:
                model(part, use_cache=True, **{CACHE_NAME: cache}, **last_only)
                advance(part.shape[1])


@contextmanager
def progress(total: int, hidden: bool) -> Iterator[Any]:
    """A bar on stderr, which disappears."""
    columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def run(
    name: str | None,
    cache_size: int,
    head_profile: str | None,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    dtype: str,
    device: str,
    compare: bool,
    as_json: bool,
) -> None:
    """The command. Text goes to stdout, what is said about it to stderr; with ``as_json`` one object to stdout.

    Raises:
        Refused: for what cannot be done.
    """
    if not has_interface():
        raise Refused(f"needs transformers>={OLDEST_INTERFACE}; before that use the recipe for LLaMA")
    from ..huggingface.enabling import enable

    with _said_in_words(cache_size), one_thread() if name is None else nullcontext():
        settings = FixedSizeCacheConfig(cache_size=cache_size)
        model, tokenizer = load(name, dtype, device)
        ids = encode(tokenizer, prompt, chat, embedded=name is None)
        _check_positions(model, ids.shape[1], max_new_tokens)
        equal = FixedSizeDynamicCache(config=model.config, settings=settings)
        if not any(isinstance(layer, FixedSizeLayer) for layer in equal.layers):
            raise Refused(
                f"--model must have a cache of keys and values that grows; {model.config.model_type} has none"
            )
        longest = ids.shape[1] + max_new_tokens - 1  # the last token is said, not read
        sizes = dict(head_profile=load_profile(head_profile, model), max_tokens=max(longest, cache_size))
        with enable(model, settings=settings, **sizes) as handle:
            cache = FixedSizeDynamicCache(config=model.config, settings=handle.settings)
            ours = write(model, tokenizer, ids, cache, max_new_tokens, show=not as_json)
        full = None
        if compare:
            print("the full cache is writing, to compare", file=sys.stderr)
            stock = DynamicCache(config=model.config)
            full = write(model, tokenizer, ids, stock, max_new_tokens, show=False)
    same = first_difference(ours.tokens, full.tokens) if full else None
    if as_json:
        found = {"model": name or "embedded", "cache_size": cache_size, "prompt_tokens": ids.shape[1], **vars(ours)}
        if full:
            found |= {"full_cache": vars(full), "same_tokens": len(ours.tokens) if same is None else same}
        print(json.dumps(found, indent=2))
        return
    print(f"fixed size: {ours.line()}", file=sys.stderr)
    if full:
        print(f"full cache: {full.line()}", file=sys.stderr)
        print(_comparison(tokenizer, ours, full, same), file=sys.stderr)


@contextmanager
def _said_in_words(cache_size: int) -> Iterator[None]:
    """What can go wrong for reasons of the user's is refused; all else is a bug, and raises."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Refused(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise Refused(
            f"out of memory: {one_line(error)[:160]}; try a smaller --cache-size than {cache_size}, a shorter prompt, "
            "or --dtype bfloat16"
        ) from error


def _check_positions(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = learned_positions(model)
    if positions is not None and prompt_tokens + max_new_tokens - 1 > positions:  # the last token is not read
        raise Refused(
            f"prompt and new tokens must fit the {positions} positions that {model.config.model_type} has learned; got "
            f"{prompt_tokens} and {max_new_tokens}. Try a smaller --max-new-tokens, or a shorter prompt"
        )


def _comparison(tokenizer: Any, ours: Written, full: Written, same: int | None) -> str:
    if same is None:
        return f"both caches wrote the same {len(ours.tokens)} tokens"
    here, there = (tokenizer.decode(text.tokens[same : same + 12]) for text in (ours, full))
    return f"the same for {same} tokens, then\n  fixed size: {here!r}\n  full cache: {there!r}"
