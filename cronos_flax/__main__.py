"""``python -m cronos_flax``: the command line."""

import sys

from cronos_flax.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())
