# SPDX-License-Identifier: Apache-2.0
"""The benchmarks for a GPU, all of them that a CPU can run: every contender of every operator, and a model's steps."""

from pathlib import Path

import pytest
import torch
import transformers
from llamas import tiny_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "python"))
    import bench_cuda
    import generate_cuda

    monkeypatch.setattr(bench_cuda, "copies_beyond_l2", lambda moved: 2)
    monkeypatch.setattr(bench_cuda, "HEADS", 2)
    return bench_cuda, generate_cuda


@torch.inference_mode()
def test_contenders_of_the_operators(modules):
    bench_cuda, _ = modules
    cases = [
        bench_cuda.truncate_case(2, 300, 100),
        bench_cuda.decode_case(2, 64),
        bench_cuda.chunk_case(16, 40),
        bench_cuda.chunk_case(0, 40),
    ]
    for name, moved, contenders in cases:
        assert moved > 0, name
        for call, data in bench_cuda.with_compiled(contenders, False).values():
            for arguments in data:
                call(*arguments)
        ours = next(iter(contenders))
        assert ours.startswith(("fsdc.", "chunk_attention_")), name
        with_compiled = list(bench_cuda.with_compiled(contenders, True))
        assert with_compiled[: len(contenders)] == list(contenders)
        assert len(with_compiled) == 2 * len(contenders) - 1  # all but ours


@pytest.mark.skipif(not hasattr(transformers, "AttentionInterface"), reason="enable() needs transformers 4.56")
def test_steps_of_a_model(modules, monkeypatch):
    _, generate_cuda = modules
    from fixed_size_kv_cache import enable

    model = tiny_llama(torch.float32)
    for name, value in (("C", 24), ("PROMPT", 60), ("STEPS", 2)):
        monkeypatch.setattr(generate_cuda, name, value)
    for name, held in (
        (generate_cuda.STOCK, 60 + 2),
        (generate_cuda.STATIC, 16 + 2),
        (generate_cuda.OURS, 60 + 2),
    ):
        decoding = generate_cuda.Decoding(name, model, rows=2)
        with torch.no_grad(), enable(model, cache_size=24) if name == generate_cuda.OURS else torch.no_grad():
            decoding.prompt()
            assert decoding.step().isfinite().all()
            assert decoding.step().shape == (2, 1, model.config.vocab_size)
        assert int(decoding.cache.get_seq_length()) == held
    assert decoding.cache.layers[0].keys.shape[2] == 24
