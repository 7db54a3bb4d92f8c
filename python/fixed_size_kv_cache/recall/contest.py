# SPDX-License-Identifier: Apache-2.0
"""The full cache and rules of eviction read the same texts, word by word, and answer the same questions."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from ..compat.transformers import CACHE_NAME
from ..dynamic_cache import FixedSizeDynamicCache
from ..llama_attention import bind
from . import MODEL, language

TEXTS = 16
"""Texts of each task that recall is measured on."""

NAMES = ("full cache", "fixed size", "last tokens", "random")
"""The contenders. The full cache is transformers' own, with transformers' own attention."""


def rule(name: str, cache_size: int) -> dict[str, Any]:
    """The settings of a contender with a cache of fixed size; baselines are protected as serves them best."""
    return {
        "fixed size": {},
        "last tokens": dict(policy="streaming", sink_tokens=0),
        "random": dict(policy="random", recent_tokens=cache_size // 2),
    }[name]


def load_model(capped: bool = True) -> LlamaForCausalLM:
    """The embedded model; ``capped`` if it is to read with caches of ours."""
    model = LlamaForCausalLM.from_pretrained(MODEL).eval()
    return bind(model) if capped else model


def make_texts(task: str, length: int, count: int, seed: int) -> tuple[list[language.Stream], Tensor]:
    """``count`` streams of a task, and their ids ``[count, length]``."""
    texts = [language.stream(task, length, random.Random(f"{task} {seed} {row}")) for row in range(count)]
    return texts, torch.tensor([language.encode(text.words) for text in texts])


@dataclass
class Contender:
    """One way to remember: a model, its cache, and what it guesses."""

    name: str
    model: LlamaForCausalLM
    cache: Any
    seconds: float = 0.0

    @classmethod
    def make(cls, name: str, cache_size: int, **settings: Any) -> "Contender":
        """One of ``NAMES``; ``settings`` change its rule."""
        if name == "full cache":
            return cls(name, load_model(capped=False), DynamicCache())
        settings = rule(name, cache_size) | settings
        return cls(name, load_model(), FixedSizeDynamicCache(cache_size=cache_size, **settings))

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Iterator[Tensor]:
        """Reads texts ``[B, L]`` one word at a time; after each its guess of the next, ids ``[B]``."""
        for at in range(ids.shape[1]):
            began = time.perf_counter()
            logits = self.model(ids[:, at : at + 1], use_cache=True, **{CACHE_NAME: self.cache}).logits
            guess = logits[:, -1].argmax(-1)
            self.seconds += time.perf_counter() - began
            yield guess

    @property
    def held(self) -> int:
        """Tokens that the first layer holds, per KV head."""
        return self.cache.key_cache[0].shape[2] if isinstance(self.cache, FixedSizeDynamicCache) else self.seen

    @property
    def seen(self) -> int:
        return self.cache.get_seq_length()

    @property
    def bytes(self) -> int:
        """What the cache has allocated: keys and values, and what ours knows of each token."""
        if isinstance(self.cache, FixedSizeDynamicCache):
            return self.cache.nbytes
        config = self.model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return self.seen * per_token * self.model.dtype.itemsize


def count_right(texts: list[language.Stream], ids: Tensor, guesses: Tensor) -> tuple[int, int]:
    """Questions answered right, and all; ``guesses[b, i]`` is the guess of word ``i + 1`` of text ``b``."""
    places = [(row, at) for row, text in enumerate(texts) for at, _ in text.answers]
    return sum(int(guesses[row, at - 1] == ids[row, at]) for row, at in places), len(places)


@dataclass
class Lane:
    """What one contender has shown so far in the live part."""

    contender: Contender
    guesses: list[str] = field(default_factory=list)  # one per question
    right: int = 0


@dataclass
class Race:
    """The live part after some words: what was read, and where everybody stands."""

    task: str
    cache_size: int
    text: language.Stream
    lanes: list[Lane]
    read: int = 0
    asked: int = 0

    def figures(self) -> dict:
        """What ``--json`` says of it."""
        return {
            "task": self.task,
            "cache_size": self.cache_size,
            "words": self.read,
            "asked": self.asked,
            "contenders": [
                {
                    "rule": lane.contender.name,
                    "right": lane.right,
                    "tokens_held": lane.contender.held,
                    "tokens_seen": lane.contender.seen,
                    "cache_bytes": lane.contender.bytes,
                    "tokens_per_second": round(self.read / lane.contender.seconds),
                }
                for lane in self.lanes
            ],
        }


def race(task: str, cache_size: int, length: int, seed: int) -> Iterator[Race]:
    """Reads one text with all contenders in step; yields the state after each word."""
    (text,), ids = make_texts(task, length, 1, seed)
    lanes = [Lane(Contender.make(name, cache_size)) for name in NAMES]
    state, answers = Race(task, cache_size, text, lanes), {at for at, _ in text.answers}
    for guesses in zip(*(lane.contender.read(ids) for lane in lanes), strict=True):
        state.read += 1
        if state.read in answers:  # the next word is an answer
            state.asked += 1
            for lane, guess in zip(lanes, guesses, strict=True):
                lane.guesses.append(language.WORDS[int(guess)])
                lane.right += lane.guesses[-1] == text.words[state.read]
        yield state


def compare(cache_sizes: list[int], length: int, seed: int, texts: int = TEXTS) -> Iterator[list[dict]]:
    """Every rule at every size on all three tasks; yields, per run, a row of figures for each task."""
    made = [make_texts(task, length, texts, seed) for task in language.TASKS]
    ids = torch.cat([ids for _, ids in made])  # all tasks at once
    for name in NAMES:
        for cache_size in [None] if name == "full cache" else cache_sizes:
            reader = Contender.make(name, cache_size or length)
            guesses = torch.stack(list(reader.read(ids)), dim=1).split(texts)
            rows = []
            for task, (streams, own), guess in zip(language.TASKS, made, guesses, strict=True):
                right, asked = count_right(streams, own, guess)
                rows.append({"task": task, "rule": name, "cache_size": cache_size, "right": right, "asked": asked})
            yield rows
