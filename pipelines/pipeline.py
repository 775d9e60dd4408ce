"""All steps: `ray job submit --working-dir . -- python pipelines/pipeline.py CONFIG [overrides]`.

The same function as `raysl pipeline`.
"""

import sys
from pathlib import Path

# A job's working directory is this repository; raysl need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raysl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
