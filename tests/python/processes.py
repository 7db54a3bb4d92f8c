# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own. transformers is imported once for all of them: that takes longer than they do."""

import contextlib
import io
import multiprocessing
import os
import tempfile

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["transformers.models.llama.modeling_llama"])  # and nothing of this package


def run_program(program: str, environment: dict[str, str]) -> str:
    """What the program writes to stdout, in a folder of its own. Raises what it raises."""
    with FORKS.Pool(1) as pool:
        return pool.apply(_run, (program, environment))


def _run(program: str, environment: dict[str, str]) -> str:
    os.environ.clear()
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as written:
        os.chdir(folder)
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    return written.getvalue()
