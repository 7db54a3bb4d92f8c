# SPDX-License-Identifier: Apache-2.0
"""Families of models: the table in the docs is what happens, and nothing in it fails."""

import os
import subprocess
import sys

import pytest
import transformers

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

import families

COMMON = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "phi",
    "phi3",
    "cohere2",
    "gpt2",
    "gpt_neox",
    "opt",
]


@pytest.mark.parametrize("name", COMMON)
def test_a_common_family_works(name):
    assert families.verdict(name) == families.WORKS


def test_the_table_is_what_happens():
    """In a process of its own: some families leave settings of torch behind."""
    page = families.PAGE.read_text()
    if f"| transformers {transformers.__version__} |" not in page:
        pytest.skip(f"the table is of another version than {transformers.__version__}")
    done = subprocess.run(
        [sys.executable, families.__file__, "--print"], capture_output=True, text=True, env={**os.environ}, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert families.BLOCK.search(page)[2] == done.stdout
    assert "fails" not in done.stdout
