# SPDX-License-Identifier: Apache-2.0
"""One layer of the cache, in plain torch but for the class that transformers calls."""
