# SPDX-License-Identifier: Apache-2.0
"""Imported before transformers, by what builds on it: where there is none, the ImportError says how to get it."""

from .versions import require_transformers

require_transformers("fixed_size_kv_cache")
