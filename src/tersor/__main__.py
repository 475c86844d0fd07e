"""python -m tersor: the command line."""

import sys

from tersor.cli import main

if __name__ == "__main__":
    sys.exit(main())
