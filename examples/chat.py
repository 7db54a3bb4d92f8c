# SPDX-License-Identifier: Apache-2.0
"""Chat for as long as you like: the cache stays at its size, and each turn reads only what is new.

python examples/chat.py --model Qwen/Qwen2.5-0.5B-Instruct --cache-size 1024
"""

import argparse

import torch
import transformers
from packaging.version import parse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from fixed_size_kv_cache import FixedSizeDynamicCache, enable

CACHE = "cache" if parse(transformers.__version__) >= parse("5.24") else "past_key_values"  # what generate() calls it


def encode_turn(tokenizer, text: str, first: bool) -> torch.Tensor:
    """What the user says, with what the chat template puts around it, as ids ``[1, Q]``.

    Only the new turn is made into tokens: the cache has read the tokens of the others, and the same text made into
    tokens once more may give others.
    """
    if tokenizer.chat_template is None:
        return tokenizer(text, add_special_tokens=first, return_tensors="pt").input_ids
    user, reply = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
    turns = [user] if first else [user, reply, user]
    full = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    earlier = "" if first else tokenizer.apply_chat_template(turns[:-1], tokenize=False)
    return tokenizer(full.removeprefix(earlier), add_special_tokens=False, return_tensors="pt").input_ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat in constant memory.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a folder or a name on the Hub")
    parser.add_argument("--cache-size", type=int, default=1024, help="tokens per layer and KV head")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    enable(model, cache_size=args.cache_size)
    cache = FixedSizeDynamicCache(config=model.config, cache_size=args.cache_size)
    ids = torch.empty(1, 0, dtype=torch.long, device=model.device)  # [1, S]: all of the conversation
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        turn = encode_turn(tokenizer, text, first=ids.shape[1] == 0)
        ids = torch.cat([ids, turn.to(model.device)], dim=1)
        mask = torch.ones_like(ids)
        ids = model.generate(
            ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, streamer=streamer, **{CACHE: cache}
        )
        print(f"[{cache}, {cache.nbytes / 2**20:.1f} MiB]")


if __name__ == "__main__":
    main()
