# SPDX-License-Identifier: Apache-2.0
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin starve others on a busy machine

import pytest
import torch
from hypothesis import settings

import fixed_size_kv_cache  # noqa: F401  (loads the operators)

settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("default")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
