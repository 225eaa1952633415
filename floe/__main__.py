"""`python -m floe` is the `floe` command."""

import sys

from floe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
