# SPDX-License-Identifier: Apache-2.0
"""The operators under torch.library.opcheck, torch.compile and torch.export."""

import pytest
import torch
import torch._inductor.config
from inputs import FLOATING, assert_all_same_bits, rows

TRUNCATE = torch.ops.fsdc.truncate.default
ACCUMULATE = torch.ops.fsdc.accumulate_scores_.default


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("scores", [(2, 4, 20), (2, 8, 3, 20)], ids=["scores", "weights"])
@pytest.mark.parametrize("cache_size, include_skipped", [(7, False), (7, True), (20, True), (99, False)])
def test_opcheck_truncate(cache_size, include_skipped, scores, dtype, device):
    keys, values = rows(2, 4, 20, 8, dtype, device), rows(2, 4, 20, 6, dtype, device)
    arguments = (keys, values, torch.rand(scores, device=device).to(dtype), cache_size)
    torch.library.opcheck(TRUNCATE, arguments, {"include_skipped": include_skipped})


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_accumulate_scores(optional, dtype, device):
    weights = torch.rand(2, 8, 3, 20, device=device).to(dtype)
    more = (torch.rand(2, 3, device=device), torch.rand(2, device=device)) if optional else ()
    torch.library.opcheck(ACCUMULATE, (torch.rand(2, 4, 20, device=device), weights, *more))


@pytest.mark.parametrize("include_skipped", [False, True])
def test_one_graph_for_any_length(include_skipped, device):
    def step(keys, values, scores, weights):
        scores = scores + 1
        torch.ops.fsdc.accumulate_scores_(scores, weights)
        return TRUNCATE(keys * 2, values, scores, 64, include_skipped=include_skipped)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    # Without caches: torch 2.11 adds guards of its own when it loads a graph from its cache.
    no_caches = torch._inductor.config.patch(force_disable_caches=True)
    with torch.no_grad(), no_caches, torch._dynamo.config.patch(error_on_recompile=True):
        for S in (40, 63, 64, 65, 300):
            keys, values = rows(2, 4, S, 8, device=device), rows(2, 4, S, 8, device=device)
            scores = torch.rand(2, 4, S, device=device)
            weights = torch.rand(2, 8, 3, S, device=device)
            arguments = (keys, values, scores, weights)
            assert_all_same_bits(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize("bounds", [{"min": 2, "max": 4096}, {}], ids=["bounded", "unbounded"])
def test_export(bounds, device):
    class Truncate(torch.nn.Module):
        def forward(self, keys, scores):
            return TRUNCATE(keys, keys, scores, 16)

    S = torch.export.Dim("S", **bounds)
    arguments = (rows(1, 2, 50, 4, device=device), torch.rand(1, 2, 50, device=device))
    program = torch.export.export(Truncate(), arguments, dynamic_shapes={"keys": {2: S}, "scores": {2: S}})
    for length in (10, 16, 17, 200):
        keys, scores = rows(1, 2, length, 4, device=device), torch.rand(1, 2, length, device=device)
        assert_all_same_bits(program.module()(keys, scores), TRUNCATE(keys, keys, scores, 16))
