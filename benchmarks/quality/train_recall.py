#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded model and writes its folder: python benchmarks/quality/train_recall.py

A LLaMA of two layers learns to answer questions from what it read. To look a fact up takes two steps, one per layer:
a word has to know the word two before it ("maple" for "47" in "maple is 47"), and a question has to find the word that
knows its name. Trained from noise the first step does not pay before the second is there, and small models stay at
guessing among the codes they saw for thousands of steps. So training starts from weights that roughly do both
(``start_as_lookup``); from there it takes minutes. Everything is drawn from one seed.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fixed_size_kv_cache.recall import MODEL, POSITIONS, language

SEED = 20261124
STAGES = ((400, 96, 32), (600, 256, 16), (1200, POSITIONS, 12))  # steps, words, streams at a time
FACTS = {"needle": 12, "zipf": 24, "recency": 8}  # at most, in training
LEARNING_RATE = 2e-3
TEXTS = 64  # of each task, for the card
OTHER_WORDS = 0.1  # weight in the loss of a word that is not an answer
HIDDEN, HEAD_DIM, ROPE_THETA = 128, 32, 500_000.0


def untrained() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(language.WORDS),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=HIDDEN**-0.5,
        tie_word_embeddings=True,
        bos_token_id=language.IDS[language.BEGIN],
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def start_as_lookup(model: LlamaForCausalLM) -> None:
    """Sets the weights so that the first layer looks one and two words back, and the second looks names up.

    The residual stream is divided: dimension 0 is constant, the first half names the word itself, the next quarter the
    word before it, the last quarter the word before that. Layer 1: two heads attend by position alone (a constant query
    turned back by one and by two positions) and copy the word's name into those quarters. Layer 2: two heads compare
    "the word before me" of the query with "the word two before me" of the keys and copy the word they find.
    """
    hidden, dim = HIDDEN, HEAD_DIM
    half, quarter, pairs = hidden // 2, hidden // 4, dim // 2
    near, constant, copied, sharpness, noise = 8.0, 3.0, 3.0, 8.0, 0.1
    scale = hidden**-0.5
    speed = model.model.rotary_emb.inv_freq  # [D / 2] radians per position
    first, second = (layer.self_attn for layer in model.model.layers)

    words = model.model.embed_tokens.weight  # [V, hidden]
    words[:, 0] = 0
    words[:, half:] = 0
    words /= words.norm(dim=1, keepdim=True)
    words[:, 0] = constant * scale

    for layer in (first, second):
        for part in (layer.q_proj.weight[: 2 * dim], layer.k_proj.weight[:dim], layer.v_proj.weight[:dim]):
            part *= noise
        layer.o_proj.weight *= noise
    into = torch.linalg.qr(torch.randn(half - 1, dim))[0].T  # [D, half - 1]: a word's name in D dimensions

    strength = (near * dim**0.5) ** 0.5 / constant * (speed > 0.05)  # [D / 2]; slow pairs cannot tell neighbours apart
    first.k_proj.weight[:dim, 0] = torch.cat([strength, torch.zeros(pairs)])
    for head, back in enumerate((1, 2)):
        turned = torch.cat([strength * torch.cos(speed * back), -strength * torch.sin(speed * back)])
        first.q_proj.weight[head * dim : (head + 1) * dim, 0] = turned
        written = slice(half + head * quarter, half + (head + 1) * quarter)
        first.o_proj.weight[written, head * dim : (head + 1) * dim] += copied * scale * torch.eye(quarter, dim)
    first.v_proj.weight[:dim, 1:half] += into

    still = (speed < 0.004).nonzero()[:, 0]  # pairs that hardly turn over a whole text
    still = torch.cat([still, still + pairs])
    compare = sharpness**0.5 * torch.linalg.qr(torch.randn(quarter, len(still)))[0].T  # [still, quarter]
    second.k_proj.weight[still, half + quarter :] += compare
    for head in (0, 1):
        second.q_proj.weight[head * dim + still, half : half + quarter] += compare
        second.o_proj.weight[1:half, head * dim : (head + 1) * dim] += copied * scale * into.T
    second.v_proj.weight[:dim, 1:half] += into


def draw(count: int, length: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Ids ``[count, length]`` of texts of all three tasks, and which of them are answers, bool."""
    ids, answers = [], torch.zeros(count, length, dtype=torch.bool)
    for row in range(count):
        task = rng.choice(language.TASKS)
        fits = {"needle": (length - 1) // 16, "zipf": (length - 10) // 7, "recency": FACTS["recency"]}[task]
        text = language.stream(task, length, rng, rng.randint(1, min(fits, FACTS[task])))
        ids.append(language.encode(text.words))
        answers[row, [at for at, _ in text.answers]] = True
    return torch.tensor(ids), answers


def train(model: LlamaForCausalLM, rng: random.Random) -> int:
    """All stages, at one falling learning rate. Returns the words read."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    total, done, read, began = sum(steps for steps, _, _ in STAGES), 0, 0, time.time()
    for steps, length, count in STAGES:
        for _ in range(steps):
            rise, fall = min(1, (done + 1) / 100), 0.02 + 0.98 * (1 + math.cos(math.pi * done / total)) / 2
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rise * fall
            ids, answers = draw(count, length, rng)
            logits = model(ids, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
            weights = torch.where(answers[:, 1:], 1.0, OTHER_WORDS)
            loss = (losses * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done, read = done + 1, read + ids.numel()
            if done % 100 == 0:
                hits = (logits.argmax(-1) == ids[:, 1:])[answers[:, 1:]].float().mean()
                print(
                    f"step {done}/{total}  loss {loss:.4f}  recall {hits:.3f}  {time.time() - began:.0f} s", flush=True
                )
    return read


@torch.no_grad()
def recall_by_distance(model: LlamaForCausalLM, seed: int, texts: int) -> dict[str, dict[str, list[int]]]:
    """Per task, by how many words ago the answer was last given: [right, asked], with the full cache."""
    found = {}
    for task in language.TASKS:
        rng, bins = random.Random(f"{task} {seed}"), {}
        for _ in range(texts):
            text = language.stream(task, POSITIONS, rng)
            ids = torch.tensor([language.encode(text.words)])
            guess = model(ids, use_cache=False).logits[0].argmax(-1)
            for at, distance in text.answers:
                bucket = bins.setdefault(1 << (distance - 1).bit_length(), [0, 0])
                bucket[0] += int(guess[at - 1] == ids[0, at])
                bucket[1] += 1
        found[task] = {f"up to {limit}": bins[limit] for limit in sorted(bins)}
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(language.IDS, unk_token=language.UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.?]$"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=language.BEGIN, unk_token=language.UNKNOWN, clean_up_tokenization_spaces=False
    )


def for_transformers_4(folder: Path) -> None:
    """Says again what transformers 5 has written where 4 does not look."""
    for name, facts in (
        ("config.json", {"rope_theta": ROPE_THETA}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        facts = json.loads((folder / name).read_text()) | facts
        (folder / name).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


CARD = """\
# The embedded recall model

A LLaMA of {parameters:,} parameters that reads facts and answers questions about them. It is made for one purpose: to
show, in seconds and without a download, what evicting tokens does to recall. It knows {words} words and nothing else.

    the code of maple is 47 . the old fox walks to the river . what is the code of maple ? 47 .

| | |
| --- | --- |
| architecture | {layers} layers, hidden size {hidden}, {heads} query and {kv_heads} KV heads of dimension {dim}, RoPE |
| data | streams of the three tasks of `recall/language.py`, drawn anew for each step; no outside data |
| start | weights that look words up roughly, see `start_as_lookup` in `benchmarks/quality/train_recall.py` |
| training | {steps} steps, {read:,} words, seed {seed}, {minutes:.0f} minutes on {threads} threads, torch {torch} |
| positions | {positions}; it was trained on streams of that length |
| licence | Apache-2.0, as the project |

## Recall with the full cache

{texts} streams per task of {positions} words, of other seeds than training's; by how many words ago the answer was
last given.

| task | words ago | right | of |
| --- | --- | ---: | ---: |
{rows}
| all | | {right} | {asked} ({share:.2%}) |
"""


def card(model: LlamaForCausalLM, found: dict, read: int, seconds: float, texts: int) -> str:
    config, counts = model.config, [count for bins in found.values() for count in bins.values()]
    right, asked = (sum(column) for column in zip(*counts, strict=True))
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        words=len(language.WORDS),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=config.head_dim,
        steps=sum(steps for steps, _, _ in STAGES),
        read=read,
        seed=SEED,
        minutes=seconds / 60,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        positions=POSITIONS,
        texts=texts,
        rows="\n".join(f"| {task} | {b} | {r} | {n} |" for task, bins in found.items() for b, (r, n) in bins.items()),
        right=right,
        asked=asked,
        share=right / asked,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODEL, help="the folder to write (default: the package's)")
    arguments = parser.parse_args(arguments)
    began = time.time()
    torch.manual_seed(SEED)
    model = untrained()
    start_as_lookup(model)
    read = train(model, random.Random(SEED))
    model.eval()
    found = recall_by_distance(model, SEED + 1, TEXTS)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0)
    model.save_pretrained(arguments.output)
    tokenizer().save_pretrained(arguments.output)
    for_transformers_4(arguments.output)
    (arguments.output / "README.md").write_text(card(model, found, read, time.time() - began, TEXTS))
    print(json.dumps(found, indent=2))
    right, asked = (sum(column) for column in zip(*(c for b in found.values() for c in b.values()), strict=True))
    return 0 if right >= 0.98 * asked else 1


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(main())
