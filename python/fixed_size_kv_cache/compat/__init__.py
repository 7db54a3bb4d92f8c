# SPDX-License-Identifier: Apache-2.0
"""Versions of transformers and what of its models can be capped."""
