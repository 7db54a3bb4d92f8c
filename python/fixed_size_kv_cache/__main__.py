# SPDX-License-Identifier: Apache-2.0
from fsdc_command import main

main()
