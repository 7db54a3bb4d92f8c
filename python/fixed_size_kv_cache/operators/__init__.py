# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.fsdc``: loading them, what Python adds to them, and their specification."""
