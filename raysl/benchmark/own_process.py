"""Run a measurement in a separate process, where no earlier one has left threads or memory.

The process is ``python -m MODULE WORD ...``, and its result is the JSON object on its last line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from raysl.errors import DataError


def run_in_own_process(module: str, *words: object, timeout_s: float) -> dict[str, Any]:
    """Run a module with arguments in a separate process and return the JSON object that it prints.

    Args:
        module: Dotted name; modules of raysl are those of this process.
        words: Arguments of its command line.
        timeout_s: The process is killed after this many seconds.

    Raises:
        DataError: If the process fails, takes longer or prints no JSON; the message is the last
            line that it wrote to standard error.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"took more than {timeout_s:g} s") from None
    try:
        if done.returncode == 0:
            result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return result
    except (IndexError, ValueError):
        pass
    lines = done.stderr.strip().splitlines()
    raise DataError(lines[-1] if lines else f"ended with status {done.returncode}")
