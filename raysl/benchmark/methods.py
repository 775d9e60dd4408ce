"""Train several methods, each as a run of its own, and compare their results."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from raysl.config.load import read_mapping
from raysl.errors import RayslError
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, read_metrics

_ACCURACIES = ("untrained_knn_top1", "knn_top1", "untrained_linear_lbfgs_top1", "linear_lbfgs_top1")


class MethodRun(NamedTuple):
    """What one method reached within its budget."""

    name: str
    """Of the configuration's file."""
    method: str
    backbone: str
    images_seen: int
    """Optimizer steps times global batch."""
    seconds: float
    """From the command to the written report, of the process that ended the run."""
    images_per_s: float
    untrained_knn_top1: float
    knn_top1: float
    untrained_linear_lbfgs_top1: float
    linear_lbfgs_top1: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """Training loss at each of the steps."""

    @property
    def knn_gain(self) -> float:
        """Accuracy of nearest neighbours over that of the encoder before training."""
        return self.knn_top1 - self.untrained_knn_top1


def train_in_own_process(
    config: Path, overrides: Sequence[str], *, on_line: Callable[[str], None]
) -> Path:
    """Run ``raysl pretrain`` on a configuration; a finished run of that name is left as it is.

    A process of its own gives every method the same start, and its memory back at the end.

    Args:
        config: YAML file.
        overrides: Dotted settings.
        on_line: Gets what the run says, line by line.

    Returns:
        The run's folder.

    Raises:
        RayslError: If the run fails; the message is its own.
    """
    command = [sys.executable, "-m", "raysl", "pretrain", str(config), *overrides, "--json"]
    last = ""
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            said = [*said[-4:], line.rstrip()]
            on_line(line.rstrip())
    if process.returncode != 0:
        raise RayslError(f"{config}: the run failed:\n" + "\n".join(said))
    try:
        results: Results = json.loads(last)
        return Path(results["run_dir"])
    except (ValueError, KeyError):
        raise RayslError(f"{config}: the run gave no results; it said: {last[:200]}") from None


def read_run(path: Path) -> MethodRun:
    """Read a finished run from its folder.

    Raises:
        RayslError: If it is not finished, or was measured without labels.
    """
    folder = RunFolder(path)
    results = folder.read_results() or Results()
    missing = [key for key in (*_ACCURACIES, "seconds", "steps") if key not in results]
    if missing:
        raise RayslError(
            f"{path}: results.json lacks {', '.join(missing)}; methods are compared on finished "
            f"runs with labels to measure by (evaluate.source)"
        )
    config = read_mapping(folder.config)
    losses = [
        (record["step"], record["train/loss"])
        for record in read_metrics(folder.metrics)
        if math.isfinite(record.get("train/loss", math.nan))
    ]
    return MethodRun(
        name=path.name,
        method=config["method"]["name"],
        backbone=config["backbone"]["name"],
        images_seen=results["steps"] * config["train"]["global_batch_size"],
        seconds=results["seconds"],
        images_per_s=results["images_per_s"],
        untrained_knn_top1=results["untrained_knn_top1"],
        knn_top1=results["knn_top1"],
        untrained_linear_lbfgs_top1=results["untrained_linear_lbfgs_top1"],
        linear_lbfgs_top1=results["linear_lbfgs_top1"],
        steps=tuple(step for step, _ in losses),
        losses=tuple(loss for _, loss in losses),
    )


def markdown_table(runs: Sequence[MethodRun]) -> str:
    """Return the runs as a Markdown table, the largest gain of nearest neighbours first."""
    lines = [
        "| configuration | method | backbone | images seen | minutes | loss, first to last "
        "| kNN: before | after | linear: before | after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: -run.knn_gain):
        ends = f"{run.losses[0]:.3g} to {run.losses[-1]:.3g}" if run.losses else "-"
        cells = [
            run.name,
            run.method,
            run.backbone,
            f"{run.images_seen:,}",
            f"{run.seconds / 60:.1f}",
            ends,
            *(_share(getattr(run, key)) for key in _ACCURACIES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def replace_section(text: str, *, name: str, content: str) -> str:
    """Put content between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``, or at the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{content.strip()}\n{end}"
    if begin in text and end in text:
        before, rest = text.split(begin, 1)
        return before + section + rest.split(end, 1)[1]
    return f"{text.rstrip()}\n\n{section}\n" if text.strip() else section + "\n"
