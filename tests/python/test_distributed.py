# SPDX-License-Identifier: Apache-2.0
"""Several processes, by torchrun on the CPU: what each of them generates and keeps is what one process does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stories
import torch

pytest.importorskip("transformers.distributed", reason="this transformers has no tensor parallelism")

from distributed_worker import CHUNK, HEADS, NEW_TOKENS, OWN_PROMPTS, SHARED_PROMPT, SIZES, generate, load, prompt
from llamas import tiny_llama

PROCESSES = 2
MODELS = ["random", pytest.param("stories260K", marks=stories.needs_stories)]

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None, reason="transformers needs accelerate to shard a model"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the saved models."""
    made = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(made / "random")
    if stories.FOLDER.exists():
        stories.load_model().double().save_pretrained(made / "stories260K")
    return made


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    """What each process found."""
    worker = Path(__file__).with_name("distributed_worker.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, str(folder)], check=True, env=environment, timeout=200)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("size", [*SIZES, HEADS])
@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel(name, size, folder, found):
    model = load(folder / name)
    alone = generate(model, prompt(model, SHARED_PROMPT), size, prefill_chunk_size=CHUNK)
    for rank, facts in enumerate(found):
        mine, stock = facts["tensor parallel", name, size], facts["tensor parallel", name, None]
        assert torch.equal(mine["tokens"], alone["tokens"])
        assert torch.equal(mine["tokens"], stock["tokens"]) == (size == max(SIZES))
        for held, all_held in zip(mine["positions"], alone["positions"], strict=True):  # [B, H, T]
            of_rank = all_held.chunk(PROCESSES, dim=1)[rank]  # of unequal heads padded, ahead, to another length
            assert torch.equal(held, of_rank[..., -held.shape[2] :]) and (of_rank[..., : -held.shape[2]] == -1).all()
        assert mine["collectives"] == stock["collectives"] != {}  # none of ours


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["FSDP", "DDP"])
def test_data_parallel(kind, size, folder, found):
    model = load(folder / "random")
    for rank, facts in enumerate(found):
        chunk = max(OWN_PROMPTS) if kind == "FSDP" else CHUNK  # sharded weights: prompts come in one piece
        alone = generate(model, prompt(model, OWN_PROMPTS[rank]), size, chunk)
        mine, stock = facts[kind, size], facts[kind, None]
        assert torch.equal(mine["tokens"], alone["tokens"])
        for held, all_held in zip(mine["positions"], alone["positions"], strict=True):
            assert torch.equal(held, all_held)
        assert mine["collectives"] == stock["collectives"]
        assert (mine["collectives"] == {}) == (kind == "DDP")


def test_sharded_weights_with_texts_that_end_at_different_times(found):
    for rank, facts in enumerate(found):
        mine, whole = facts["FSDP", "own length"]["tokens"], facts["FSDP", min(SIZES)]["tokens"]
        assert mine.shape[1] == OWN_PROMPTS[rank] + NEW_TOKENS // (1 + rank)
        assert torch.equal(mine, whole[:, : mine.shape[1]])
