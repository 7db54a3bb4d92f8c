# SPDX-License-Identifier: Apache-2.0
"""``enable(model)``: attention and generate() of Hugging Face transformers."""
