# SPDX-License-Identifier: Apache-2.0
"""vLLM: a plugin, experimental; what it does and what it refuses is in docs/vllm.md."""
