"""Write an encoder in the formats of others: `python pipelines/export.py RUN --format onnx`.

The same function as `raysl export`.
"""

import sys
from pathlib import Path

# A job's working directory is this repository; raysl need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysl.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
