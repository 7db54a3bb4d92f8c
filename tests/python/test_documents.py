# SPDX-License-Identifier: Apache-2.0
"""What the documents show is what happens."""

import doctest
import importlib.util
import os
import re
import shlex
import socket
from pathlib import Path

import pytest
import torch
from processes import run_program
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fixed_size_kv_cache import dynamic_cache, head_profile, settings
from fixed_size_kv_cache.compat.transformers import CACHE_NAME
from fixed_size_kv_cache.huggingface import enabling, profiling
from fixed_size_kv_cache.layer import score_rule
from fixed_size_kv_cache.operators import reference
from fixed_size_kv_cache.recall import MODEL

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


def blocks_of(document: str, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    assert {found for found, _ in blocks} <= {"python", "bash", "cpp", ""}  # each of which a test below runs
    return [block for found, block in blocks if found in languages]


def as_called_here(code: str) -> str:
    """Documents call the cache as the newest transformers does, and say what older ones call it."""
    return re.sub(r"(?<=[(, ])cache(?==\w)|(?<=\bout\.)cache\b", CACHE_NAME, code)


PASTED = [
    (document, block)
    for document in DOCUMENTS
    for block in blocks_of(document, "python")
    if not block.startswith(">>>")  # those of docs/operators.md, which are docstrings
]
ALERT = """
import logging, warnings
for category in (FutureWarning, DeprecationWarning):
    warnings.filterwarnings("error", category=category)
class Alert(logging.Handler):
    def emit(self, record):
        assert "deprecated" not in record.getMessage(), record.getMessage()
logging.getLogger("transformers").addHandler(Alert())
"""


def test_every_document_with_code_is_tried():
    assert {document: sum(document == name for name, _ in PASTED) for document, _ in PASTED} == {
        "README.md": 6,
        "docs/distributed.md": 3,
        "docs/huggingface.md": 4,
    }


@pytest.mark.parametrize("document, block", PASTED, ids=[f"{document} {i}" for i, (document, _) in enumerate(PASTED)])
def test_a_block_can_be_pasted_alone(document, block, tmp_path):
    """Into a new Python; none speaks of anything deprecated."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FSDC_")}
    if document == "docs/distributed.md":  # as torchrun starts it, with one process
        if importlib.util.find_spec("accelerate") is None:
            pytest.skip("transformers needs accelerate to shard a model")
        where = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        environment |= where
    begin = f"import os; os.chdir({str(tmp_path)!r})\n"  # some write files
    said = run_program(begin + ALERT + as_called_here(block), environment)
    promised = re.findall(r"^print\(.*\)  # (\w[\w.]*\(.*?\))(?:$|:)", block, re.MULTILINE)
    assert [line for line in said.splitlines() if line in promised] == promised


def test_the_documented_questions_are_answered():
    (block,) = (block for block in blocks_of("docs/huggingface.md", "python") if "copy.deepcopy" in block)
    assert run_program(as_called_here(block), dict(os.environ)).split() == ["47", "82"]


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def test_readme_commands_run(tmp_path, fsdc):
    """As they stand there, but for what a test cannot do."""

    def run(command: str) -> str:
        name, *arguments = shlex.split(command)
        assert name == "fsdc"
        return fsdc(*arguments)

    install_and_show, run_tests, elsewhere, generate = blocks_of("README.md", "bash")

    *installs, show = install_and_show.strip().split(" && ")
    assert installs == ["pip install -U pip", "pip install -e ."]  # tests/run has done both, of this very checkout
    *_, last = run(f"{show} --length 128").splitlines()  # all of it takes a minute
    assert last.strip()

    assert os.access(ROOT / run_tests.strip(), os.X_OK)  # it runs this test, so this test cannot run it

    install, wheel = (shlex.split(line) for line in elsewhere.splitlines())
    assert install == ["pip", "install", "git+URL"]
    assert wheel == ["pip", "wheel", "--no-deps", "--wheel-dir", "dist", "git+URL"]
    assert "pip wheel --no-deps -w" in (ROOT / ".ci/run").read_text()  # which compiles for minutes

    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(vocab_size=212, **SMALL)).save_pretrained(tmp_path)
    assert "path/or/hub-id" in generate
    assert run(generate.replace("path/or/hub-id", str(tmp_path)))


def test_readme_cpp_is_compiled():
    """The test of the C++ library has the same lines, one after another."""
    (block,) = blocks_of("README.md", "cpp")
    tested = [line.strip() for line in (ROOT / "tests/cpp/ops/test_operators.cpp").read_text().splitlines()]
    places = [tested.index(line) for line in block.splitlines() if line]
    assert len(places) == 2 and places == sorted(places)


class Parser(doctest.DocTestParser):
    def parse(self, string: str, name: str = "<string>") -> list:
        return super().parse(as_called_here(string), name)


def test_docstring_examples():
    for module, least in (
        (reference, 6),
        (dynamic_cache, 5),
        (settings, 1),
        (enabling, 7),
        (head_profile, 2),
        (profiling, 5),
    ):
        names = {"torch": torch, "FixedSizeDynamicCache": dynamic_cache.FixedSizeDynamicCache}
        names |= {"enable": enabling.enable, "FixedSizeCacheConfig": settings.FixedSizeCacheConfig}
        names |= {"HeadProfile": head_profile.HeadProfile, "profile_heads": profiling.profile_heads}
        tests = doctest.DocTestFinder(parser=Parser()).find(module, extraglobs=names)
        results = [doctest.DocTestRunner().run(test) for test in tests]
        assert sum(result.attempted for result in results) >= least
        assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text()):
        assert ((ROOT / document).parent / link).exists(), link


def test_paths_that_are_named_exist():
    """In documents and in comments of C++ sources; NAME stands for any operator."""
    sources = [path for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*.*")]
    text = "\n".join(path.read_text() for path in (*sources, *(ROOT / document for document in DOCUMENTS)))
    named = set(re.findall(r"(?<![\w/.-])(?:python|csrc|kernels|tests|benchmarks|docs)/[\w/.-]*\w", text))
    assert len(named) > 30
    assert [path for path in sorted(named) if "NAME" not in path and not (ROOT / path).exists()] == []


def test_the_score_rule_cites_the_sources_of_its_page():
    cited = re.findall(r"arXiv (\d{4}\.\d{5})", score_rule.__doc__)
    page = (ROOT / "docs/eviction.md").read_text()
    assert len(cited) == 5
    assert re.findall(r"\[arXiv (\d{4}\.\d{5})\]\(https://arxiv\.org/abs/\1\)", page) == cited


def test_figures_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks/python")
    import tables

    for name in tables.DOCUMENTS:
        document = (ROOT / name).read_text()
        assert tables.BLOCK.search(document), name
        assert tables.rendered(document) == document, name


def test_the_operators_page_is_that_of_the_docstrings(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import write_operators

    names = ["truncate", "accumulate_scores_", "decode_attention_", "chunk_attention_"]
    assert list(write_operators.schemas()) == names
    assert write_operators.PAGE.read_text() == write_operators.page()


def test_troubleshooting_quotes_what_the_code_says():
    sources = [
        path for folder in ("python", "csrc") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h")
    ]
    code = "\n".join(path.read_text() for path in (*sources, ROOT / "setup.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that go on in the next line
    quoted = re.findall(r'^\*\*"(.*)"\*\*', (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 10
    for text in quoted:
        if "_OpNamespace" in text:  # torch says that
            with pytest.raises(AttributeError, match=re.escape(text.replace("'truncate'", "'no_such'"))):
                _ = torch.ops.fsdc.no_such
        else:
            for part in text.split("..."):
                assert part.strip(" ;") in code, text
