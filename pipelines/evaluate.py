"""Evaluate: `ray job submit --working-dir . -- python pipelines/evaluate.py RUN [settings]`.

The same function as `raysl evaluate`.
"""

import sys
from pathlib import Path

# A job's working directory is this repository; raysl need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysl.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
