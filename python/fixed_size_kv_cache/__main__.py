# SPDX-License-Identifier: Apache-2.0
from .cli.app import main

main()
