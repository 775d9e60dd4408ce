"""Run a measurement in a separate process, without threads and memory of earlier measurements.

The process is ``python -m MODULE WORD ...``; its result is the JSON object on its last line.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from raysl.errors import DataError

_OWN_CLASS = re.compile(r"^raysl\.errors\.\w+: ")  # the last line of a traceback begins with it


def run_in_own_process(module: str, *words: object, timeout_s: float) -> dict[str, Any]:
    """Run a module in a separate process, and return the JSON object on its last line.

    Args:
        module: Dotted name of the module; raysl is imported from the same place as here.
        words: Arguments of the command line.
        timeout_s: Seconds after which the process is killed.

    Raises:
        DataError: If the process fails, takes longer or prints no JSON; the message is the last
            line that it wrote to standard error.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    try:
        process = subprocess.run(
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
        if process.returncode == 0:
            result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
            return result
    except (IndexError, ValueError):
        pass
    lines = process.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"ended with status {process.returncode}"
    raise DataError(_OWN_CLASS.sub("", reason))
