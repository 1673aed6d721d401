"""`python -m mdsnn`: the same as the `mdsnn` command."""

from mdsnn.cli import program

program()
