"""`python -m raysl`: the same as the `raysl` command."""

import sys

from raysl.cli import main

if __name__ == "__main__":
    sys.exit(main())
