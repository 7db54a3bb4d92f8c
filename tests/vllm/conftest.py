# SPDX-License-Identifier: Apache-2.0
"""These tests run where vLLM is installed: ``tests/vllm/run``."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "python")]
if find_spec("vllm"):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in the process of the test, where it starts fast
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
    """The model stories260K, where it is, as a folder that vLLM loads."""
    import stories

    if not stories.FOLDER.exists():
        pytest.skip(f"the model stories260K is not at {stories.FOLDER}")
    folder = tmp_path_factory.mktemp("stories")
    stories.load_model().save_pretrained(folder)
    return folder
