"""The memory of all processes of a trial over time: samples, slopes and a picture."""

import csv
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faults.trial import processes

_FIELDS = (
    "time",
    "run",
    "role",
    "pid",
    "started",
    "rss_mib",
    "pss_mib",
    "private_mib",
    "shared_mib",
)
_WARM_UP_S = 600.0  # of a process: imports, pools of its allocator, first batches
_FEWEST_S = 1200.0  # shorter lives after the warm-up tell no slope per hour
_FASTEST = 2
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A7A7A", "#222222")


class Sampler(threading.Thread):
    """Appends the memory of every process of a run to a CSV file.

    Args:
        mark: The trial.
        run: Which of its runs.
        path: The file.
        every_s: Seconds between two samples.
    """

    def __init__(self, mark: str, run: str, path: Path, *, every_s: float = 10.0) -> None:
        super().__init__(daemon=True, name="faults-memory")
        self._mark, self._run, self._path, self._every_s = mark, run, path, every_s
        self.ends = threading.Event()

    def run(self) -> None:
        """Sample until ``ends`` is set."""
        is_new = not self._path.exists()
        with open(self._path, "a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(_FIELDS)
            while not self.ends.wait(self._every_s):
                now = round(time.time(), 1)
                for process in processes(self._mark):
                    with suppress(OSError, KeyError):
                        if process.run == self._run:
                            who = [process.run, process.role, process.pid]
                            sizes = _sizes(process.pid)
                            writer.writerow([now, *who, round(process.started, 1), *sizes])
                file.flush()


def _sizes(pid: int) -> list[float]:
    """Return RSS, PSS, memory of its own, and its part of shared memory, in MiB."""
    kib = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        kib[name] = int(value)
    names = ("Rss:", "Pss:", "Pss_Anon:", "Pss_Shmem:")
    return [round(kib[name] / 1024, 2) for name in names]


class Life(NamedTuple):
    """The samples of one process."""

    run: str
    role: str
    started: float
    times: np.ndarray  # seconds since 1970
    mib: np.ndarray  # of its own: what a leak makes grow


def read_lives(path: Path) -> list[Life]:
    """Return the processes of a file, in the order of their start."""
    rows: Mapping[Any, list[tuple[float, float]]] = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            key = (row["run"], row["role"], float(row["started"]), row["pid"])
            rows[key].append((float(row["time"]), float(row["private_mib"])))
    return [
        Life(run, role, started, *np.array(samples).T)
        for (run, role, started, _), samples in sorted(rows.items(), key=lambda item: item[0][2])
    ]


def slopes(lives: Iterable[Life]) -> list[dict[str, Any]]:
    """Return for each run and role how memory changed within processes and from one to the next.

    ``mib_per_hour`` is the slope of a straight line through all samples of the role's processes
    that lived long enough, each with a height of its own, without their warm-up. ``peaks_mib`` are
    the medians of the highest values of the first and of the last third of the processes.
    """
    by_role: Mapping[tuple[str, str], list[Life]] = defaultdict(list)
    for life in lives:
        by_role[life.run, life.role].append(life)
    table = []
    for (run, role), found in sorted(by_role.items()):
        used = [_after_warm_up(life) for life in found]
        long = [(t, m) for t, m in used if len(t) and t[-1] - t[0] >= _FEWEST_S]
        slope = None
        if long:
            times = np.concatenate([t - t.mean() for t, _ in long]) / 3600
            mib = np.concatenate([m - m.mean() for _, m in long])
            slope = round(float(times @ mib / (times @ times)), 2)
        peaks = [float(life.mib.max()) for life in found if len(life.mib) >= 3]
        third = max(1, len(peaks) // 3)
        ends = (
            [statistics.median(peaks[:third]), statistics.median(peaks[-third:])] if peaks else []
        )
        table.append(
            {
                "run": run,
                "role": role,
                "processes": len(found),
                "long_lived": len(long),
                "mib_per_hour": slope,
                "peaks_mib": [round(value, 1) for value in ends],
            }
        )
    return table


def _after_warm_up(life: Life) -> tuple[np.ndarray, np.ndarray]:
    used = life.times >= life.started + _WARM_UP_S
    return life.times[used], life.mib[used]


def as_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the slopes as a Markdown table."""
    lines = ["| run | process | started | long-lived | MiB an hour | peak, first and last third |"]
    lines.append("|---|---|---|---|---|---|")
    for row in table:
        slope = "" if row["mib_per_hour"] is None else f"{row['mib_per_hour']:+.1f}"
        peaks = " -> ".join(f"{value:.0f}" for value in row["peaks_mib"])
        cells = (row["run"], row["role"], row["processes"], row["long_lived"], slope, peaks)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(lives: Sequence[Life], faults: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the memory of each run over time, with a mark at each fault.

    Shown are the roles that need most, and those that grow fastest.
    """
    from raysl.report.figure import GREY, LIGHT_GREY, new_figure, save_png, style_axes  # noqa: PLC0415

    runs = sorted({life.run for life in lives})
    roles = _shown_roles(lives)
    began = min(life.times[0] for life in lives)
    figure = new_figure(height_in=2.6 * len(runs) + 0.4)
    for axes, run in zip(np.atleast_1d(figure.subplots(len(runs), sharex=True)), runs, strict=True):
        for fault in faults if run == "disturbed" else ():
            axes.axvline((fault["time"] - began) / 60, color=LIGHT_GREY, linewidth=0.8, zorder=0)
        for life in lives:
            if life.run == run and life.role in roles and len(life.times) > 1:
                color = _COLORS[roles.index(life.role)]
                axes.plot((life.times - began) / 60, life.mib, color=color, linewidth=0.9)
        style_axes(axes, title=f"{run}: private memory of each process, MiB")
        axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes", fontsize=8, color=GREY)
    for role, color in zip(roles, _COLORS, strict=False):
        figure.axes[0].plot([], [], color=color, label=role)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=7)
    save_png(figure, path)


def _shown_roles(lives: Sequence[Life]) -> list[str]:
    largest = [role for role, _ in _largest(lives)]
    growth = {row["role"]: row["mib_per_hour"] or 0.0 for row in slopes(lives)}
    fastest = sorted(growth, key=lambda role: -growth[role])[:_FASTEST]
    kept = [role for role in largest if role not in fastest][: len(_COLORS) - len(fastest)]
    return kept + fastest


def _largest(lives: Iterable[Life]) -> list[tuple[str, float]]:
    peaks: dict[str, float] = {}
    for life in lives:
        peaks[life.role] = max(peaks.get(life.role, 0.0), float(life.mib.max()))
    return sorted(peaks.items(), key=lambda item: -item[1])
