# SPDX-License-Identifier: Apache-2.0
"""What the documents show is what happens."""

import doctest
import re
from pathlib import Path

import pytest

from fixed_size_kv_cache import reference

ROOT = Path(__file__).resolve().parents[2]


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:  # in one session, as a reader would
        exec(compile(block, "README.md", "exec"), names)


def test_docstring_examples():
    result = doctest.testmod(reference)
    assert result.attempted >= 4
    assert result.failed == 0


@pytest.mark.parametrize("document", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text()):
        assert (ROOT / link).exists(), link


def test_readme_figures_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks/python")
    from readme_table import rendered

    readme = (ROOT / "README.md").read_text()
    assert "us (" in readme
    assert rendered(readme) == readme
