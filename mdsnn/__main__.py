"""`python -m mdsnn`: the same as the `mdsnn` command."""

import sys

from mdsnn.cli import main

sys.exit(main())
