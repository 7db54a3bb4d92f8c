# SPDX-License-Identifier: Apache-2.0
"""A KV cache of fixed size that keeps the tokens with the most accumulated attention.

Importing the package loads the operators ``torch.ops.fsdc.truncate`` and ``torch.ops.fsdc.accumulate_scores_``;
:mod:`fixed_size_kv_cache.reference` documents and specifies them.
"""

from . import _load, _operators  # noqa: F401
from ._version import __version__

__all__ = ["__version__"]
