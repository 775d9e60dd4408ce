"""Make an encoder of a checkpoint of others: `python pipelines/import.py CHECKPOINT`.

The same function as `raysl import`.
"""

import sys
from pathlib import Path

# A job's working directory is this repository; raysl need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysl.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
