"""Run a measurement in a separate process: a pickled task in, one line of JSON out.

A DataLoader forks its workers, which a process connected to Ray must not do; nor should one
measurement find the threads and the memory of another.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysl.errors import DataError, RayslError, to_record


def environment() -> dict[str, str]:
    """Return this process's environment, in which a child finds raysl where this one did."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def ask(module: str, task: object, *, name: str) -> dict[str, Any]:
    """Run ``python -m module``, which calls :func:`answer`, and return what it says.

    Args:
        module: Its dotted name.
        task: What it is to measure; anything that can be pickled.
        name: Of the measurement, for messages.

    Raises:
        DataError: If it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=pickle.dumps(task),
        capture_output=True,
        check=False,
        env=environment(),
    )
    try:
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        what = lines[-1] if lines else f"exit status {done.returncode}"
        raise DataError(f"{name}: failed: {what}") from None
    if "error" in said:
        raise DataError(f"{name}: {said['message']}")
    return said


def answer(measure: Callable[[Any], Any]) -> None:
    """Answer the task on standard input by one line on standard output.

    Args:
        measure: Takes the task and returns a named tuple of plain values.
    """
    # The parent's own words; by its module's name, since in the child that file is __main__.
    task = pickle.loads(sys.stdin.buffer.read())
    try:
        said: dict[str, Any] = measure(task)._asdict()
    except RayslError as error:
        said = {**to_record(error)}
    sys.stdout.write(json.dumps(said) + "\n")
