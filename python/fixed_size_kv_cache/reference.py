# SPDX-License-Identifier: Apache-2.0
from .operators.reference import *  # noqa: F403
from .operators.reference import __all__, __doc__  # noqa: F401
