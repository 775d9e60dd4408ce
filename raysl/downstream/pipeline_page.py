"""Write the report of a pipeline: a picture and a table of the accuracy of each network."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.lines import Line2D

from raysl.report.document import (
    collapsible,
    draw_each,
    escape,
    files_section,
    picture_html,
    section,
    write_page,
)
from raysl.report.figure import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    legend_above,
    new_figure,
    save_png,
    style_axes,
)
from raysl.report.measure import duration_text
from raysl.track.results import StepResult

_KINDS = {
    "scratch": ("from random weights", GREY),
    "linear": ("linear, encoder frozen", ORANGE),
    "finetune": ("fine-tuned", BLUE),
    "distill": ("distilled", GREEN),
}
_FILES = (
    ("pipeline.yaml", "the pipeline, every setting resolved"),
    ("pipeline.json", "the table above"),
    ("pretrain", "the run folder of the pretraining; the other steps have theirs beside it"),
    ("pictures", "the pictures of this page"),
    ("mlflow.json", "the MLflow run that tracks this pipeline"),
)
_ROW_IN = 0.27  # height of a row of the picture


class _Measured(NamedTuple):
    row: StepResult
    labels: float
    top1: float


def draw_pipeline(
    folder: Path,
    *,
    name: str,
    rows: Sequence[StepResult],
    settings: str,
    shown: str | None = None,
) -> list[tuple[str, str]]:
    """Draw the picture of a pipeline, then write its page.

    Args:
        folder: Receives ``pictures/accuracy.png`` and ``report.html``.
        name: Name of the pipeline.
        rows: One for each finished step.
        settings: The configuration as YAML.
        shown: The folder's address in a store, of which ``folder`` is a local copy.

    Returns:
        The name and the error of each picture, or of ``report``, that failed.
    """
    pictures = folder / "pictures"
    failures: list[tuple[str, str]] = []
    picture = ""
    if _measured(rows):
        failures = draw_each(pictures, {"accuracy": lambda path: draw_accuracies(path, rows)})
        picture = picture_html(pictures, "accuracy", "Accuracy of each network as a dot")
    sections = [
        section("Accuracy on the test images", picture + _table(rows), _NOTE),
        section("Settings", collapsible("Configuration", f"<pre>{escape(settings)}</pre>")),
        files_section(folder, _FILES, shown=shown),
    ]
    try:
        write_page(folder / "report.html", name=name, lead=_lead(rows), sections=sections)
    except Exception as error:  # a failed page must not end the runs
        failures.append(("report", f"{type(error).__name__}: {error}"))
    return failures


_NOTE = (
    "Each network in evaluation mode on every test image. Layer: how many layers of the projection "
    "head stay on the encoder, 0 for none. For the pretraining, it is the accuracy of a linear "
    "classifier, or nearest neighbours, on frozen features with all labels. Single runs: "
    "differences of about a point may be chance."
)


def draw_accuracies(path: Path, rows: Sequence[StepResult]) -> None:
    """Draw a dot for each network, sorted by share of the labels.

    Args:
        path: PNG to write.
        rows: One for each finished step; at least one of a network trained on labels.
    """
    shown = _measured(rows)
    shares = sorted({each.labels for each in shown})
    figure = new_figure(height_in=1.4 + _ROW_IN * (len(shown) + 1.6 * len(shares)))
    heights = [sum(each.labels == share for each in shown) for share in shares]
    grid = figure.subplots(
        len(shares),
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axes, share in zip(grid[:, 0], shares, strict=True):
        group = [each for each in shown if each.labels == share]
        style_axes(axes, title=_share_text(share, group[0].row["num_labels"]), grid="x")
        for position, each in enumerate(reversed(group)):
            value = 100 * each.top1
            axes.plot([0, value], [position, position], color="#D9D9D9", linewidth=1.2, zorder=1)
            axes.plot(
                [value], [position], "o", color=_KINDS[each.row["kind"]][1], markersize=6, zorder=2
            )
            axes.annotate(
                f"{value:.1f}",
                (value, position),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(
            range(len(group)), [_row_text(each.row) for each in reversed(group)], fontsize=8
        )
        axes.set_ylim(-0.6, len(group) - 0.4)
        axes.set_xlim(0, 1.12 * max(1.0, *(100 * each.top1 for each in shown)))
    grid[-1, 0].set_xlabel("top-1 accuracy, %", fontsize=8)
    kinds = [kind for kind in _KINDS if any(each.row["kind"] == kind for each in shown)]
    handles = [
        Line2D([], [], marker="o", linestyle="", color=_KINDS[kind][1], label=_KINDS[kind][0])
        for kind in kinds
    ]
    legend_above(figure, handles, title="How the network was trained")
    save_png(figure, path)


def _measured(rows: Sequence[StepResult]) -> list[_Measured]:
    return [
        _Measured(row, row["labels"], row["top1"])
        for row in rows
        if row["kind"] in _KINDS and row["top1"] is not None and row["labels"] is not None
    ]


def _row_text(row: StepResult) -> str:
    text = {"scratch": "random weights", "distill": f"student {row['student']}"}
    if row["kind"] in text:
        return text[row["kind"]]
    layer = row["head_layers"]
    where = "encoder alone" if not layer else f"head layer {layer}"
    return f"linear, {where}" if row["kind"] == "linear" else where


def _share_text(share: float, num_labels: int | None) -> str:
    count = "" if num_labels is None else f" ({num_labels:,})"
    return f"{100 * share:g} % of the labels{count}"


def _lead(rows: Sequence[StepResult]) -> str:
    measured = _measured(rows)
    if not measured:
        return "No step that learns from labels has finished yet."
    best = max(measured, key=lambda each: each.top1)
    return (
        f"Best of {len(measured)} networks: <code>{escape(best.row['step'])}</code>, with "
        f"{100 * best.top1:.1f} % top-1 accuracy from {100 * best.labels:g} % of the labels."
    )


def _table(rows: Sequence[StepResult]) -> str:
    heads = ("Step", "Labels", "Layer", "Teacher", "Network", "Top-1, %", "Time")
    lines = ["<tr>" + "".join(f"<th scope=col>{head}" for head in heads)]
    for row in rows:
        share, top1, layer = row["labels"], row["top1"], row["head_layers"]
        cells = (
            "&ndash;" if share is None else f"{100 * share:g} %",
            "&ndash;" if layer is None else str(layer),
            escape(row["teacher"]) if row["teacher"] else "&ndash;",
            escape(row["backbone"]),
            "&ndash;" if top1 is None else f"{100 * top1:.1f}",
            escape(duration_text(row["seconds"])),
        )
        lines.append(
            f"<tr><th scope=row><code>{escape(row['step'])}</code>"
            + "".join(f"<td>{cell}" for cell in cells)
        )
    return "<div class=scroll><table class=trials>\n" + "\n".join(lines) + "\n</table></div>"
