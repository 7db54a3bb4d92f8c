# SPDX-License-Identifier: Apache-2.0
"""One model over several devices: each process caps the KV heads that it has, and tells the others nothing about it.

torchrun --nproc-per-node 2 examples/tensor_parallel.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Once upon a time"
"""

import argparse

import torch
import torch.distributed as dist
import transformers
from packaging.version import parse
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from fixed_size_kv_cache import enable

CACHE = "cache" if parse(transformers.__version__) >= parse("5.24") else "past_key_values"  # what generate() calls it


def main() -> None:
    parser = argparse.ArgumentParser(description="Tensor parallel, in constant memory.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a folder or a name on the Hub")
    parser.add_argument("--cache-size", type=int, default=1024, help="tokens per layer and KV head")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sharded = DistributedConfig(tp_plan="auto")  # up to transformers 4.57: from_pretrained(..., tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", distributed_config=sharded).eval()
    enable(model, cache_size=args.cache_size)

    torch.manual_seed(0)  # the same on every process, should the model draw its tokens
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, return_dict_in_generate=True)

    cache, rank = out[CACHE], dist.get_rank()
    if rank == 0:
        print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    print(f"process {rank}: {cache} by each of {cache.get_held_tokens().shape[1]} KV heads", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
