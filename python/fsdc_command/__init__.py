# SPDX-License-Identifier: Apache-2.0
"""The command ``fsdc``. It stands beside the package, whose import loads torch: help, the version and the refusal of
wrong options do not wait for that."""

import warnings


def main() -> None:
    """The entry point of ``fsdc`` and ``python -m fixed_size_kv_cache``."""
    # Without the place in the code, which Python would print too.
    warnings.formatwarning = lambda message, *_, **__: f"fsdc: {' '.join(str(message).split())}\n"
    try:
        from .app import app

        app(prog_name="fsdc")
    except KeyboardInterrupt:  # before typer was there to catch it
        raise SystemExit(130) from None
