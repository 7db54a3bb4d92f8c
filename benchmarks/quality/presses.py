#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Judges kvpress's rules as real_model.py judges ours: the same model, texts, questions and slots, after a prompt.

    pip install "transformers<5.3" kvpress gguf accelerate  # in an environment of its own
    python benchmarks/quality/small_llama.py TOKENIZER  # in ours: older transformers make another one of the GGUF file
    python benchmarks/quality/presses.py --texts FOLDER --tokenizer TOKENIZER --json benchmarks/results/presses.json

Each press runs as kvpress ships it, with its defaults. A press prunes a layer once the layer has read the prompt, so at
its peak it holds what real_model.py's rules hold. Presses that only mask keys (AdaKV and its kin) are not here: those
keys stay in memory. Figures are written as they come, and what the file has already is not measured again. An hour of
one core; ``--count`` scales it.
"""

import argparse
import copy
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from real_results import FULL, Results
from real_texts import BEGIN, CONTINUATION, FACTS, Passage, Texts, passages
from rich.progress import Progress
from small_llama import load
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

PRESSES = {
    "SnapKV": kvpress.SnapKVPress,
    "Critical(SnapKV)": lambda: kvpress.CriticalKVPress(kvpress.SnapKVPress()),
    "ObservedAttention": kvpress.ObservedAttentionPress,
    "TOVA": kvpress.TOVAPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
}
MEASURE = "prompt"


def read(model: Any, ids: Tensor, cache: DynamicCache, seen: int) -> Tensor:
    """Reads tokens ``[Q]`` after ``seen`` others, whatever the cache still holds of those: log probabilities."""
    positions = torch.arange(seen, seen + len(ids))[None]
    return model(ids[None], past_key_values=cache, position_ids=positions).logits[0].float().log_softmax(-1)


def prefill(model: Any, ids: Tensor, press: Any | None, C: int) -> DynamicCache:
    """What a press leaves of a prompt, ``C`` tokens of each layer and KV head; ``None``: everything."""
    cache = DynamicCache(config=model.config)
    if press is None:
        model(ids[None], past_key_values=cache, logits_to_keep=1)
        return cache
    press.compression_ratio = 1 - (C + 0.5) / len(ids)
    with press(model):
        model(ids[None], past_key_values=cache, logits_to_keep=1)
    held = {layer.keys.shape[2] for layer in cache.layers}
    assert held == {C}, f"{press} must leave {C} tokens; got {held}"
    return cache


def ask(model: Any, cache: DynamicCache, passage: Passage) -> tuple[Tensor, int, float]:
    """As real_model.py asks: log probabilities of the continuation, right answers, mean log probability of a digit."""
    seen, right, said = len(passage.turns[0]), 0, []
    for question in passage.questions:
        found = read(model, question.ids, copy.deepcopy(cache), seen)[-question.digits - 1 : -1]
        answer = question.ids[-question.digits :]
        right += bool((found.argmax(-1) == answer).all())
        said.append(found.gather(1, answer[:, None]).mean().item())
    return read(model, passage.continuation, copy.deepcopy(cache), seen), right, sum(said) / len(said)


def measured(
    model: Any, passage: Passage, tried: list[tuple[str, int]]
) -> Iterator[tuple[dict, int | None, int, dict]]:
    """Rule, size, slots and figures of the full cache and of all that is tried."""
    full: Tensor | None = None
    ids = passage.turns[0]
    for name, C in [("full cache", None), *tried]:
        press = None if C is None else PRESSES[name]()
        model.set_attn_implementation("eager" if name == "ObservedAttention" else "sdpa")
        cache = prefill(model, ids, press, C)
        model.set_attn_implementation("sdpa")
        found, right, said = ask(model, cache, passage)
        full = found if C is None else full
        kl = (full.exp() * (full - found)).sum(-1).mean().item()
        figures = dict(kl=round(kl, 6), right=right, asked=len(passage.questions), digits=round(said, 4))
        yield FULL if C is None else {"name": name}, C, C or len(ids), dict(tokens=len(ids), **figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="a folder of files *.txt")
    parser.add_argument("--model", help="a folder or a name on the Hub; else SmolLM2-135M-Instruct")
    parser.add_argument("--tokenizer", help="the folder of another tokenizer than the model's")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--count", type=int, default=20, help="texts")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--presses", nargs="+", choices=PRESSES, default=list(PRESSES))
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    if arguments.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    head = {
        "model": arguments.model or "SmolLM2-135M-Instruct",
        "kvpress": importlib.metadata.version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "facts": FACTS[MEASURE],
        "continuation": CONTINUATION,
    }
    results, texts = Results(arguments.json, head), Texts(arguments.texts, tokenizer, BEGIN[MEASURE])
    every = [(name, C) for name in arguments.presses for C in arguments.sizes]
    with torch.inference_mode(), Progress() as bar:
        count = arguments.count
        for text, passage in bar.track(enumerate(passages(texts, MEASURE, count)), total=count, description="presses"):
            tried = [(name, C) for name, C in every if results.count(MEASURE, {"name": name}, C) <= text]
            for rule, C, slots, figures in measured(model, passage, tried) if tried else ():
                if results.count(MEASURE, rule, C) <= text:
                    results.add(MEASURE, rule, C, slots, **figures)
            results.write()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
