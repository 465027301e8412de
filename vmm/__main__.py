"""`python -m vmm` is the `trio-vmm` command."""

import sys

from vmm.cli import main

sys.exit(main())
