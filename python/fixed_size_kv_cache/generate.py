# SPDX-License-Identifier: Apache-2.0
"""``fsdc generate``: text from any decoder-only model, with a cache of fixed size."""

import inspect
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

from ._compat import CACHE_NAME, DynamicLayer
from ._versions import OLDEST_INTERFACE, has_interface
from .dynamic_cache import FixedSizeDynamicCache
from .layer import FixedSizeLayer
from .recall import MODEL
from .settings import FixedSizeCacheConfig

CHUNK = 512  # tokens of a prompt that are read at a time, at least


class Refused(Exception):
    """What the user asked for cannot be done; the text says why."""


@dataclass
class Written:
    """What one model wrote."""

    tokens: list[int]
    text: str
    tokens_seen: int
    tokens_held: int
    cache_bytes: int
    full_cache_bytes: int
    tokens_per_second: float

    def line(self) -> str:
        return (
            f"{self.tokens_seen} tokens seen, {self.tokens_held} held by each layer and KV head; cache "
            f"{size(self.cache_bytes)}, in full {size(self.full_cache_bytes)}; {self.tokens_per_second:.1f} tokens/s"
        )


def load(name: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer: a folder, a name on the Hub, or None for the embedded model.

    Raises:
        Refused: where there is no such model, where it is not a decoder, or where it cannot be reached.
    """
    where = str(MODEL) if name is None else name
    if name is not None and Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise Refused(f"--model must be a folder with a config.json or a name on the Hub; {name} has no config.json")
    try:
        torch.zeros(1).to(device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"--device {device}: {str(error).strip()}") from error
    try:
        config = AutoConfig.from_pretrained(where)
        if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
            raise Refused(f"--model must be a decoder-only language model; {where} is {config.model_type}")
        tokenizer = AutoTokenizer.from_pretrained(where)
        return AutoModelForCausalLM.from_pretrained(where, dtype=dtype).to(device).eval(), tokenizer
    except Refused:
        raise
    except Exception as error:  # missing, damaged, unreachable, too large: transformers has no common class for them
        raise Refused(f"--model {where}: {str(error).strip()}") from error


def encode(tokenizer: Any, prompt: str, chat: bool, embedded: bool) -> Tensor:
    """The prompt as ids ``[1, Q]``."""
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
                f"the embedded model knows {len(tokenizer)} words (fsdc demo shows them); not {', '.join(unknown)}. "
                "Try 'the code of maple is 47 . what is the code of maple ?', or another --model"
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
    seen, held, now, full = account(cache)
    return Written(new, tokenizer.decode(new, skip_special_tokens=True), seen, held, now, full, len(new) / seconds)


def account(cache: Any) -> tuple[int, int, int, int]:
    """Tokens seen, the most that a layer that could grow holds, and the bytes of keys and values: now, and if nothing
    were evicted. Layers with a window, or without keys, are the same in both."""
    seen, held, now, full = cache.get_seq_length(), 0, 0, 0
    for layer in cache.layers:
        own = isinstance(layer, FixedSizeLayer)
        pair = layer.held() if own else (getattr(layer, "keys", None), getattr(layer, "values", None))
        if pair[0] is None or pair[0].numel() == 0:
            continue
        count = sum(x.numel() * x.element_size() for x in pair)
        now += count
        if own or type(layer) is DynamicLayer:
            held = max(held, pair[0].shape[2])
            count = count // pair[0].shape[2] * seen
        full += count
    return seen, held, now, full


def size(count: int) -> str:
    """'1.5 MiB' for a number of bytes."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def parting(ours: list[int], full: list[int]) -> int | None:
    """The first place where two texts differ, None where they are the same."""
    places = (at for at, pair in enumerate(zip(ours, full, strict=False)) if pair[0] != pair[1])
    return next(places, None if len(ours) == len(full) else min(len(ours), len(full)))


def _read(model: Any, ids: Tensor, cache: Any) -> None:
    """Reads all of a prompt ``[1, Q]`` but its last token; a long one with progress on stderr."""
    chunk = CHUNK
    if isinstance(cache, FixedSizeDynamicCache):
        chunk = max(chunk, cache.settings.cache_size)
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
        raise Refused(f"fsdc generate needs transformers>={OLDEST_INTERFACE}; before that use the recipe for LLaMA")
    from .enabling import enable

    try:
        settings = FixedSizeCacheConfig(cache_size=cache_size)
        model, tokenizer = load(name, dtype, device)
        ids = encode(tokenizer, prompt, chat, embedded=name is None)
        with enable(model, settings=settings):
            cache = FixedSizeDynamicCache(config=model.config, settings=settings)
            ours = write(model, tokenizer, ids, cache, max_new_tokens, show=not as_json)
        full = None
        if compare:
            stock = DynamicCache(config=model.config)
            full = write(model, tokenizer, ids, stock, max_new_tokens, show=False)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Refused(str(error)) from error
    parts = parting(ours.tokens, full.tokens) if full else None
    if as_json:
        facts = {"model": name or "embedded", "cache_size": cache_size, "prompt_tokens": ids.shape[1], **vars(ours)}
        if full:
            facts |= {"full_cache": vars(full), "same_tokens": len(ours.tokens) if parts is None else parts}
        print(json.dumps(facts, indent=2))
        return
    print(f"fixed size: {ours.line()}", file=sys.stderr)
    if full:
        print(f"full cache: {full.line()}", file=sys.stderr)
        print(_parting_line(tokenizer, ours, full, parts), file=sys.stderr)


def _parting_line(tokenizer: Any, ours: Written, full: Written, parts: int | None) -> str:
    if parts is None:
        return f"both caches wrote the same {len(ours.tokens)} tokens"
    here, there = (tokenizer.decode(text.tokens[parts : parts + 12]) for text in (ours, full))
    return f"the same for {parts} tokens, then\n  fixed size: {here!r}\n  full cache: {there!r}"
