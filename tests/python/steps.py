# SPDX-License-Identifier: Apache-2.0
"""Steps of a cache with attention weights that a test chooses."""

import torch

from fixed_size_kv_cache.layer.attention import LogitRule

PLAIN = dict(score_decay=1.0, score_prior=0.0, value_weight=False, redundancy=0.0, sink_tokens=0, recent_tokens=0)


def step(cache, keys, values, weights, layer_idx=0):
    """One step with given attention weights [B, Hq, Q, T + Q]."""
    seen, _ = cache.update(keys, values, layer_idx)
    query = torch.zeros(*weights.shape[:3], keys.shape[-1])
    return cache.cache_truncate(layer_idx, query, seen, weights)


def attend(cache, x, mask=None, rule=LogitRule(0.5)):  # noqa: B008  (a tuple)
    """One step: ``x`` ``[B, heads, Q, D]`` holds the keys and the values of two KV heads, and then the queries."""
    cache.update(x[:, :2], x[:, 2:4], 0)
    return cache.attend(0, x[:, 4:], mask, rule)


def one_token(value: float, H: int = 2, D: int = 3) -> torch.Tensor:
    return torch.full((1, H, 1, D), value)


def last_column(T: int, mass: float = 1.0, Hq: int = 2) -> torch.Tensor:
    weights = torch.zeros(1, Hq, 1, T)
    weights[..., -1] = mass
    return weights
