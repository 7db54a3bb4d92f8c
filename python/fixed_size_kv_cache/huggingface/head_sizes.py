# SPDX-License-Identifier: Apache-2.0
"""From the profile of a model's KV heads to a size for each of them."""

import dataclasses
import os
from typing import Any

from ..head_budgets import head_budgets
from ..head_profile import HeadProfile
from ..settings import FixedSizeCacheConfig


def with_profile(
    settings: FixedSizeCacheConfig,
    profile: HeadProfile | str | os.PathLike,
    floor: float,
    max_tokens: int | None,
    config: Any,
) -> FixedSizeCacheConfig:
    """Settings with ``cache_size`` shared out among the KV heads of a model.

    Args:
        settings: whose ``cache_size`` is the average.
        profile: of the model, or the file of one.
        floor: the share of the average that every head has.
        max_tokens: no head gets more.
        config: that of the model.

    Raises:
        TypeError: for what is neither a profile nor a path.
        ValueError: for the profile of another model, and for sizes that are shared out already.
    """
    if not isinstance(settings.cache_size, int):
        raise ValueError(
            "enable: cache_size must be one number, the average, where a head_profile shares it out; got sizes of "
            "layers or heads"
        )
    if isinstance(profile, (str, os.PathLike)):
        profile = HeadProfile.load(profile)
    if not isinstance(profile, HeadProfile):
        raise TypeError(
            f"enable: head_profile must be a HeadProfile, the path of one, or True; got {type(profile).__name__}"
        )
    profile.check_model(config)
    sizes = head_budgets(profile.output_error, settings.cache_size, floor, max_tokens)
    return dataclasses.replace(settings, cache_size=sizes)
