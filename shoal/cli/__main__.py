"""Starts the command: `python -m shoal.cli`."""

import sys

from shoal.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
