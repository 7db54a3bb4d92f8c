# SPDX-License-Identifier: Apache-2.0
"""One context, many questions: a long text is read once, and each question is asked on a copy of its small cache.

python examples/questions.py --context README.md "What is this about?" "How is it installed?"
python examples/questions.py --context README.md --at-once "What is this about?" "How is it installed?"
"""

import argparse
import copy
from pathlib import Path

import torch
import transformers
from packaging.version import parse
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixed_size_kv_cache import FixedSizeDynamicCache, enable

CACHE = "cache" if parse(transformers.__version__) >= parse("5.24") else "past_key_values"  # what generate() calls it


def read(model, context: torch.Tensor, cache_size: int) -> FixedSizeDynamicCache:
    """A cache that has read the context ``[1, S]``, in chunks, so that memory is bounded here too."""
    cache = FixedSizeDynamicCache(config=model.config, cache_size=cache_size)
    model.generate(context, attention_mask=torch.ones_like(context), max_new_tokens=1, **{CACHE: cache})
    return cache


def ask(model, tokenizer, cache: FixedSizeDynamicCache, context: torch.Tensor, question: str, **arguments) -> str:
    """One question. The cache stays as it is: evicted tokens do not come back, so copy before you ask."""
    turn = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    ids = torch.cat([context, turn], dim=1)  # [1, S + Q]; what the cache has read is not read again
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: copy.deepcopy(cache)}, **arguments)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def ask_at_once(model, tokenizer, cache, context: torch.Tensor, questions: list[str], **arguments) -> list[str]:
    """All questions in one batch, a row of the cache for each."""
    rows = copy.deepcopy(cache)
    rows.batch_repeat_interleave(len(questions))
    turns = tokenizer(questions, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
    turns = turns.to(model.device)
    context = context.expand(len(questions), -1)
    ids = torch.cat([context, turns.input_ids], dim=1)  # [questions, S + Q], padding between the two
    mask = torch.cat([torch.ones_like(context), turns.attention_mask], dim=1)
    out = model.generate(ids, attention_mask=mask, **{CACHE: rows}, **arguments)
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Read a text once, ask many questions.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a folder or a name on the Hub")
    parser.add_argument("--cache-size", type=int, default=1024, help="tokens per layer and KV head")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--context", type=Path, required=True, help="a file to read")
    parser.add_argument("--at-once", action="store_true", help="all questions in one batch")
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    enable(model, cache_size=args.cache_size)

    context = tokenizer(args.context.read_text(), return_tensors="pt").input_ids.to(model.device)
    cache = read(model, context, args.cache_size)
    print(f"[read once: {cache}, {cache.nbytes / 2**20:.1f} MiB]")

    arguments = dict(max_new_tokens=args.max_new_tokens, do_sample=False)
    if args.at_once:
        answers = ask_at_once(model, tokenizer, cache, context, args.questions, **arguments)
    else:
        answers = [ask(model, tokenizer, cache, context, question, **arguments) for question in args.questions]
    for question, answer in zip(args.questions, answers, strict=True):
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
