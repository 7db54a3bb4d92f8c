# SPDX-License-Identifier: Apache-2.0
"""What each process of test_distributed does: torchrun --nproc-per-node 2 distributed_worker.py FOLDER

``FOLDER`` holds saved models; what a process finds goes to ``FOLDER/RANK.pt``.
"""

import inspect
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from fixed_size_kv_cache import enable

NEW_TOKENS = 24
SIZES = (256, 32)  # no eviction; eviction
HEADS = "heads"  # a size for each KV head
CHUNK = 64  # tokens of a prompt that are read at a time
SHARED_PROMPT = 100  # tokens, of a tensor parallel run: all processes have the same prompt
OWN_PROMPTS = (50, 90)  # of a data parallel run: each has its own, one within a chunk, one beyond


def prompt(model: Any, length: int) -> torch.Tensor:
    """Two rows ``[2, length]``."""
    return torch.randint(3, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))


def sizes_of_heads(config: Any) -> list[list[int]]:
    """``[layers][heads]``, 32 on average."""
    sizes = (20, 60, 36, 12)
    return [
        [sizes[(i + h) % len(sizes)] for h in range(config.num_key_value_heads)]
        for i in range(config.num_hidden_layers)
    ]


def generate(model: Any, ids: torch.Tensor, cache_size: int | str | None, chunk: int = CHUNK, **arguments: Any) -> dict:
    """The tokens, and the positions that each layer holds; None: the stock cache."""
    greedy = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    arguments = greedy | arguments
    if cache_size is None:
        return {"tokens": model.generate(ids, **arguments).sequences}
    cache_size = sizes_of_heads(model.config) if cache_size == HEADS else cache_size
    with enable(model, cache_size=cache_size, prefill_chunk_size=chunk):
        out = model.generate(ids, **arguments)
    layers = range(model.config.num_hidden_layers)
    positions = [out.past_key_values.get_positions(i).sort().values for i in layers]  # [B, H, T]
    return {"tokens": out.sequences, "positions": positions}


class Collectives(TorchDispatchMode):
    """Counts how often processes meet. (torch's CommDebugMode does too, but its hooks break transformers 4.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it becomes collectives and operators on plain tensors, which come here again
        if op.namespace in ("c10d", "_c10d_functional"):
            self.counts[str(op)] += 1
        return op(*args, **(kwargs or {}))


def count_collectives(*arguments: Any, **more: Any) -> dict[str, Any]:
    """What ``generate`` finds, and the collectives of it."""
    with Collectives() as met:
        return generate(*arguments, **more) | {"collectives": dict(met.counts)}


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **arguments).eval()


def tensor_parallel(folder: Path) -> Any:
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        return load(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    return load(folder, tp_plan="auto")


def fsdp(folder: Path) -> Any:
    model = load(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, found = dist.get_rank(), {}
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        model = tensor_parallel(folder / name)
        ids, chunks = prompt(model, SHARED_PROMPT), dict(prefill_chunk_size=CHUNK)  # stock's too, to be counted alike
        for size in (None, *SIZES, HEADS):
            found["tensor parallel", name, size] = count_collectives(model, ids, size, **chunks)
    model = fsdp(folder / "random")
    ids = prompt(model, OWN_PROMPTS[rank])
    generate(model, ids, None)  # the first forward gathers once more
    for size in (None, *SIZES):
        found["FSDP", size] = count_collectives(model, ids, size)
    own_length = dict(max_new_tokens=NEW_TOKENS // (1 + rank))  # a process goes on while another has more to do
    found["FSDP", "own length"] = generate(model, ids, min(SIZES), **own_length)
    model = DistributedDataParallel(load(folder / "random"))
    for size in (None, *SIZES):
        found["DDP", size] = count_collectives(model.module, ids, size)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
