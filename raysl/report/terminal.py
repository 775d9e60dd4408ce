"""Print to the terminal: messages and progress on standard error, tables on standard output."""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from raysl.errors import hide_passwords
from raysl.sources.source import Source
from raysl.track.follow import Record
from raysl.track.results import (
    TRAINING,
    Features,
    Results,
    Score,
    measured_probes,
    score_of,
)

_LINE_EVERY_S = 10.0
_PLAIN_WIDTH = 110
_MAX_NOTES = 12

# Key, label and format of the metrics in a progress line.
_PROGRESS_METRICS = (
    ("train/loss", "loss", "{:.3f}"),
    ("train/lr", "lr", "{:.2g}"),
    ("train/images_per_s", "img/s", "{:.0f}"),
    ("data/wait_share", "data wait", "{:.0%}"),
    ("train/feature_std", "std", "{:.2f}"),
    ("train/effective_rank", "rank", "{:.0f}"),
    ("eval/knn_top1", "kNN", "{:.1%}"),
    ("eval/top1", "top-1", "{:.1%}"),
)


def console(*, error: bool = False) -> Console:
    """Return a console on standard output, or on standard error; 110 columns wide if piped."""
    stream = sys.stderr if error else sys.stdout
    return Console(
        file=stream,
        width=None if stream.isatty() else _PLAIN_WIDTH,
        highlight=False,
        soft_wrap=True,
    )


def say(text: str) -> None:
    """Print a message to standard error, without the passwords of addresses in it."""
    console(error=True).print(hide_passwords(text), markup=False)


def say_notes(source: Source, more: Sequence[str] = (), *, title: str | None = None) -> None:
    """Print the notes of a source, such as those about skipped files.

    Args:
        source: The source of the notes.
        more: Further notes.
        title: Line before the notes; None if the previous line names the source.
    """
    lines = [*source.notes, *more]
    if lines and title is not None:
        say(title)
    for line in lines[:_MAX_NOTES]:
        say(f"  {line}")
    if len(lines) > _MAX_NOTES:
        say(f"  {len(lines) - _MAX_NOTES:,} more: raysl data {shlex.quote(source.name)}")


def print_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object as the last line of standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class ProgressView:
    """Shows the progress of a run: a bar on a terminal, else a line every ten seconds.

    Args:
        total_steps: Optimizer steps of the run.
        done: Optimizer steps that are already done, from an earlier start.
    """

    def __init__(self, *, total_steps: int, done: int) -> None:
        self.total_steps = total_steps
        self._latest: dict[str, float] = {}
        self._step = done
        self._console = console(error=True)
        self._last_line = 0.0
        self._finished = False
        self._num_evaluations = 0
        self._said_waiting = False
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "", total=total_steps, completed=done, metrics="starting"
            )
            self._bar.start()

    def update(self, records: Sequence[Record], *, num_evaluations: int = 0) -> None:
        """Show new records of the metrics file, and the number of evaluations that are running."""
        changed = num_evaluations != self._num_evaluations
        self._num_evaluations = num_evaluations
        for record in records:
            self._step = max(self._step, int(record["step"]))
            self._latest.update({k: v for k, v in record.items() if k not in ("step", "time")})
        if not records and not changed:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, metrics=self._text())
            return
        finished = self._step >= self.total_steps and not self._finished
        is_due = time.monotonic() - self._last_line >= _LINE_EVERY_S and not self._finished
        if is_due or finished:
            self._last_line = time.monotonic()
            self._finished = self._finished or finished
            text = self._text() or "first step done"
            self._console.print(f"step {self._step}/{self.total_steps}  {text}", markup=False)
        if self._finished and num_evaluations and not self._said_waiting:
            self._said_waiting = True
            self._console.print(f"waiting for {self._evaluations()}", markup=False)

    def note(self, text: str) -> None:
        """Print a message that is not progress."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _text(self) -> str:
        parts = [
            f"{label} {form.format(self._latest[name])}"
            for name, label, form in _PROGRESS_METRICS
            if name in self._latest
        ]
        if self._num_evaluations:
            parts.append(f"{self._evaluations()} running")
        return "  ".join(parts)

    def _evaluations(self) -> str:
        count = self._num_evaluations
        return f"{count} evaluation{'s' if count > 1 else ''}"


def accuracy_table(results: Results) -> Table:
    """Return a table of accuracies: of pretrained features, untrained features and plain pixels."""
    table = Table(title="Accuracy of frozen features on the test images")
    table.add_column("features")
    probes = measured_probes(results)
    for probe in probes:
        table.add_column(_probe_title(probe, results), justify="right")
    rows: dict[Features, str] = {
        "": "pretrained",
        "untrained_": "before training",
        "pixels_": "pixels",
    }
    for features, label in rows.items():
        scores = [score_of(results, probe, features) for probe in probes]
        if any(scores):
            table.add_row(label, *map(_cell, scores), style="bold" if not features else None)
    table.caption = "\n".join(trained_lines(results)) or None
    return table


def trained_lines(results: Results) -> list[str]:
    """Return the accuracy of each protocol that trains the network, one line each."""
    values = cast(Mapping[str, Any], results)
    return [
        f"fine-tuned on {values[f'{name}_labels']:,} labels: {_cell(score)}"
        for name in TRAINING
        if (score := score_of(results, name)) is not None
    ]


def _probe_title(probe: str, results: Results) -> str:
    if probe == "knn":
        return f"kNN (k {results['knn_k']})"
    if probe == "few_shot":
        few = f"{results['few_shot_labels']} labels per class"
        return f"{few} (mean of {results['few_shot_draws']})"
    return {"linear_lbfgs": "linear probe"}.get(probe, f"{probe} probe, by SGD")


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    spread = "" if score.deviation is None else f" +- {100 * score.deviation:.1f}"
    return f"{score.mean:.1%}{spread}"


def mapping_table(title: str, values: Mapping[str, Any]) -> Table:
    """Return a table of names and values."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for name, value in values.items():
        table.add_row(name, escape(f"{value:g}" if isinstance(value, float) else str(value)))
    return table


def classifier_line(results: Results) -> str:
    """Return the accuracy of a trained classifier in one line."""
    return (
        f"{results['top1']:.1%} top-1 accuracy on {results['num_test_labels']:,} test images of "
        f"{results['num_classes']} classes, trained with {results['num_labels']:,} labels"
    )
