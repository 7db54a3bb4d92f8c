# SPDX-License-Identifier: Apache-2.0
"""An engine of vLLM with a cache of fixed size, the stock one, and transformers with the same cache."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from fixed_size_kv_cache import enable

MEMORY = 64 << 20


@contextmanager
def stock(folder: Path, **options) -> Iterator[LLM]:
    """vLLM as it is, small."""
    sizes = dict(max_model_len=512, max_num_seqs=4, kv_cache_memory_bytes=MEMORY)
    llm = LLM(str(folder), skip_tokenizer_init=True, **dict(dtype="float32", enforce_eager=True) | sizes | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def capped(folder: Path, cache_size: int, prefill_chunk_size: int = 32, **options):
    """The same model with a cache of fixed size."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return stock(
        folder,
        hf_overrides={"architectures": [f"FixedSize{name}"]},
        additional_config={"fsdc": {"cache_size": cache_size, "prefill_chunk_size": prefill_chunk_size}},
        **options,
    )


def random_prompts(lengths: list[int], vocabulary: int = 212, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[1, *torch.randint(3, vocabulary, (n - 1,), generator=generator).tolist()] for n in lengths]


def run(llm: LLM, prompts: list[list[int]], count: int, **options) -> list:
    """What the engine says to prompts that all come at once, greedily."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


def tokens(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    return [list(answer.outputs[0].token_ids) for answer in run(llm, prompts, count)]


def expected_logits(
    folder: Path, prompts: list[list[int]], count: int, cache_size: int, prefill_chunk_size: int = 32
) -> list[torch.Tensor]:
    """Of each greedy token, ``[count, vocabulary]``, in transformers with the same cache and the same cuts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    enable(model, cache_size=cache_size, prefill_chunk_size=prefill_chunk_size)
    options = dict(max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(torch.cat(made.logits))
    return found


def expected_tokens(*arguments) -> list[list[int]]:
    """The greedy tokens of :func:`expected_logits`."""
    return [logits.argmax(-1).tolist() for logits in expected_logits(*arguments)]
