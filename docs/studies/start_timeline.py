"""Draw what the processes of a run do between Enter and the first optimizer step.

    python docs/studies/start_timeline.py PICTURE quickstart train.steps=2 evaluate.every=null

A row is a process, its shade the share of a core that it used. ``--code CHECKOUT`` draws another
version. The command line is that of ``raysl pretrain``; the run folder is a temporary one.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults.trial import Trial, end_all, processes, records

_EVERY_S = 0.1
_LIMIT_S = 300.0
_FEWEST_CPU_S = 0.15  # processes that used less are one row
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Row(NamedTuple):
    """A process: when it started and ended, and the CPU seconds of each interval."""

    role: str
    started_s: float
    ended_s: float
    cpu_s: np.ndarray


def watch(code: Path, config: str, overrides: list[str]) -> tuple[list[Row], float]:
    """Run the command until its first step; return its processes, and when the step was done."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder) / f"start-{os.getpid()}", code)
        began = time.time()
        given = [f"output_dir={trial.folder}/runs", "name=start", *overrides]
        driver = trial.start([sys.executable, "-m", "raysl", "pretrain", config, *given])
        run = trial.folder / "runs" / "start"
        samples: dict[int, list[tuple[float, float]]] = {}
        facts: dict[int, tuple[str, float]] = {}
        try:
            while time.time() - began < _LIMIT_S:
                now = time.time() - began
                for process in processes(trial.mark):
                    facts[process.pid] = process.role, process.started - began
                for pid in facts:  # Ray's agents lose their mark when they set their titles
                    with suppress(OSError):
                        samples.setdefault(pid, []).append((now, _cpu_s(pid)))
                first = next((r for r in records(run) if "time/first_step_at" in r), None)
                if first is not None:
                    return _rows(samples, facts), first["time/first_step_at"] - began
                if driver.poll() is not None:
                    break
                time.sleep(_EVERY_S)
            raise RuntimeError(f"no step within {_LIMIT_S:g} s: {trial.text()}")
        finally:
            end_all(trial.mark)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _rows(
    samples: dict[int, list[tuple[float, float]]], facts: dict[int, tuple[str, float]]
) -> list[Row]:
    end = max(times[-1][0] for times in samples.values())
    edges = np.arange(0.0, end + _EVERY_S, _EVERY_S)
    rows, rest = [], np.zeros(len(edges) - 1)
    for pid, points in samples.items():
        role, started = facts[pid]
        times, cpu = np.array([(max(0.0, started), 0.0), *points]).T
        used = np.diff(np.interp(edges, times, cpu, left=0.0, right=cpu[-1]))
        if cpu[-1] < _FEWEST_CPU_S:
            rest += used
        else:
            rows.append(Row(role, times[0], times[-1], used))
    rows.sort(key=lambda row: row.started_s)
    return [*rows, Row("all others", 0.0, end, rest)]


def draw(path: Path, rows: list[Row], first_step_s: float) -> None:
    """Draw a row for each process."""
    from raysl.report.figure import BLUE, INK, new_figure, save_png, style_axes  # noqa: PLC0415

    figure = new_figure(height_in=1.1 + 0.24 * len(rows))
    axes = figure.subplots()
    total = sum(row.cpu_s.sum() for row in rows)
    style_axes(axes, title=f"Enter to the first step: {first_step_s:.1f} s, {total:.1f} CPU s")
    for number, row in enumerate(rows):
        axes.barh(number, row.ended_s - row.started_s, left=row.started_s, height=0.7, color="#eee")
        for interval, used in enumerate(row.cpu_s):
            if used > 0:
                alpha = min(1.0, float(used) / _EVERY_S)
                left = interval * _EVERY_S
                axes.barh(number, _EVERY_S, left=left, height=0.7, color=BLUE, alpha=alpha)
    axes.axvline(first_step_s, color=INK, linewidth=1)
    names = [f"{row.role} ({row.cpu_s.sum():.1f})" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds; in brackets CPU seconds", fontsize=8, color=INK)
    save_png(figure, path)


def main() -> None:
    """Read the command line, run and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--code", type=Path, default=Path(__file__).resolve().parents[2])
    arguments = parser.parse_args()
    rows, first_step_s = watch(arguments.code, arguments.config, arguments.overrides)
    for row in rows:
        lived, cpu_s = f"{row.started_s:6.1f} to {row.ended_s:5.1f} s", row.cpu_s.sum()
        print(f"{lived}, {cpu_s:5.1f} CPU s, {row.role}")
    print(f"first step after {first_step_s:.1f} s")
    draw(arguments.picture, rows, first_step_s)


if __name__ == "__main__":
    main()
