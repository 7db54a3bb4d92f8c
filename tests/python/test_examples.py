# SPDX-License-Identifier: Apache-2.0
"""Every program in examples/ runs, on the embedded model: it has read facts and is asked for them."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer

if not hasattr(transformers, "AttentionInterface"):
    pytest.skip("enable() needs transformers 4.56", allow_module_level=True)

from fixed_size_kv_cache.recall import MODEL

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CACHE_SIZE = 64
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TEXT = "<s> the code of maple is 47 . the code of fern is 82 . " + "the old fox walks to the river . " * 12
QUESTIONS = {"what is the code of maple ?": "47", "what is the code of fern ?": "82"}


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"pip install -e '.[examples]' for {', '.join(missing)}")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded model, saved with a chat template."""
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("saved") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def run(monkeypatch, capsys, name: str, *arguments: str) -> str:
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("has_template", [True, False])
def test_chat(has_template, model, monkeypatch, capsys):
    turns = [TEXT, *QUESTIONS]

    def typed(prompt: str) -> str:
        if not turns:
            raise EOFError
        return turns.pop(0)

    monkeypatch.setattr("builtins.input", typed)
    folder = str(model if has_template else MODEL)
    said = run(monkeypatch, capsys, "chat.py", "--model", folder, "--cache-size", "64", "--max-new-tokens", "2")
    answers = re.findall(r"^(\w+) \.$", said, re.MULTILINE)
    assert answers[-2:] == list(QUESTIONS.values())
    assert re.findall(r"(\d+) of (\d+) tokens held", said)[0] == ("64", str(len(TEXT.split()) + 1))


@pytest.mark.parametrize("how", [[], ["--at-once"]])
def test_questions(how, tmp_path, monkeypatch, capsys):
    (tmp_path / "context.txt").write_text(TEXT)
    arguments = ["--context", str(tmp_path / "context.txt"), "--max-new-tokens", "1", *how, *QUESTIONS]
    said = run(monkeypatch, capsys, "questions.py", "--model", str(MODEL), "--cache-size", "64", *arguments)
    assert f"64 of {len(TEXT.split())} tokens held" in said
    for question, answer in QUESTIONS.items():
        assert f"{question} {answer}\n" in said


@pytest.fixture
def server(model):
    """The address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "server.py"), "--model", str(model), "--cache-size", "64"]
    process = subprocess.Popen([*command, "--port", str(port)])
    address = f"http://127.0.0.1:{port}/chat"
    try:
        for _ in range(600):
            try:
                request("GET", address)
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def request(method: str, address: str, **fields) -> str:
    body = json.dumps(fields).encode() if fields else None
    asked = urllib.request.Request(address, body, {"content-type": "application/json"}, method=method)
    with DIRECTLY.open(asked, timeout=60) as answer:
        return answer.read().decode()


@needs("fastapi", "uvicorn")
def test_server(server):
    def talk(name: str, question: str) -> str:
        request("POST", f"{server}/{name}", text=TEXT, max_new_tokens=2)
        return request("POST", f"{server}/{name}", text=question, max_new_tokens=2)

    with ThreadPoolExecutor() as pool:  # conversations at the same time, each with its own cache
        answers = list(pool.map(talk, ("ada", "bob"), QUESTIONS))
    assert [answer.split()[0] for answer in answers] == list(QUESTIONS.values())

    there = json.loads(request("GET", server))
    assert there.keys() == {"ada", "bob"}
    assert there["ada"] == there["bob"] and there["ada"]["tokens"] > CACHE_SIZE

    request("DELETE", f"{server}/ada")
    assert json.loads(request("GET", server)).keys() == {"bob"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        request("DELETE", f"{server}/ada")


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="up to transformers 4.57 the call is another")
@needs("accelerate")
def test_tensor_parallel():
    prompt = TEXT + next(iter(QUESTIONS))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "tensor_parallel.py"), "--model", str(MODEL), "--cache-size", "64"]
    command += ["--max-new-tokens", "1", "--prompt", prompt]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=200, env=environment).stdout
    assert "what is the code of maple ? 47" in said
    for rank in range(2):
        seen = len(prompt.split())
        expected = (
            f"process {rank}: FixedSizeDynamicCache(64 of {seen} tokens held, cache_size=64) by each of 1 KV heads"
        )
        assert expected in said


def test_notebook(monkeypatch, capsys):
    cells = json.loads(read("examples/tour.ipynb"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # none are kept
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert names.keys() >= {"MODEL", "CACHE_SIZE", "PROMPT"}
            names |= dict(MODEL=str(MODEL), PROMPT=TEXT)
    said = capsys.readouterr().out
    assert [held for held, _ in re.findall(r"(\d+) of (\d+) tokens held", said)] == ["64"] * 3
    assert "\nTrue\n" in said  # the stock text while all tokens fit


def test_all_examples_are_tested_and_listed():
    tested = Path(__file__).read_text() + read("tests/vllm/test_server.py")
    listed = read("examples/README.md")
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(names) == 6
    for name in names:
        assert name in tested and f"({name})" in listed


def read(path: str) -> str:
    return (ROOT / path).read_text()
