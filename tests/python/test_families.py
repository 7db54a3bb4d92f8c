# SPDX-License-Identifier: Apache-2.0
"""Families of models: the table in the docs is what happens, and nothing in it fails."""

import os
import re
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


HAS_TABLE = f"| transformers {transformers.__version__} |" in families.PAGE.read_text()


@pytest.fixture(scope="module")
def printed() -> str:
    """The table as it comes out now. In a process of its own: some families leave settings of torch behind."""
    done = subprocess.run(
        [sys.executable, families.__file__, "--print"], capture_output=True, text=True, env={**os.environ}, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", COMMON)
def test_a_common_family_works(name, request):
    if not HAS_TABLE:
        assert families.verdict(name) == families.WORKS
        return
    (works,) = re.findall(r"^\| works \(\d+\) \| (.*) \|$", request.getfixturevalue("printed"), re.MULTILINE)
    assert name in works.split(", ")


@pytest.mark.skipif(not HAS_TABLE, reason=f"the table is of another version than {transformers.__version__}")
def test_the_table_is_what_happens(printed):
    assert families.BLOCK.search(families.PAGE.read_text())[2] == printed
    assert "fails" not in printed
