# SPDX-License-Identifier: Apache-2.0
"""Imported before transformers, by what builds on it: where there is none, the ImportError says how to get it."""

from ._versions import require_transformers

require_transformers(__package__)
