"""`raysl benchmark label_free`: measure how well label-free measures rank encoders."""

import argparse
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from raysl.benchmark.label_free import (
    DEFAULTS,
    DIRECTIONS,
    UNTRAINED,
    EncoderScores,
    Study,
    StudyConfig,
    Subject,
    correlations,
    find_subjects,
    groups_of,
    interval_text,
    markdown_table,
    open_subject,
    untrained_like,
)
from raysl.benchmark.label_free_picture import draw_label_free
from raysl.benchmark.methods import replace_section
from raysl.config.load import apply_overrides, validate
from raysl.errors import ConfigError, RayslError
from raysl.evaluate.label_free import VERSION
from raysl.evaluate.old_keys import resolved
from raysl.folder.whole import write_text
from raysl.report.terminal import console, say, say_notes
from raysl.sources.place import absolute_config

SECTION = "label_free"

_EPILOG = """\
Each encoder is measured without labels on the training images and with them by a linear classifier
and by nearest neighbours. Spearman's correlation with linear accuracy, with a 95 % interval by
resampling encoders, says how well a measure ranks them: over all, over the trained encoders of one
backbone, and within each method of which there are five.

  raysl benchmark label_free runs/* data.source=cifar10
  raysl benchmark label_free runs/mine --checkpoints data.source=train.parquet \\
      evaluate.source=test.parquet evaluate.max_train_images=20000
"""


def add_arguments(kinds: Any, *, whole: Callable[[str], int]) -> None:
    """Declare the benchmark's arguments.

    Args:
        kinds: What `raysl benchmark` measures.
        whole: Reads a number above 0.
    """
    text = "RankMe, alpha-ReQ, alignment and uniformity beside linear accuracy, over many encoders"
    parser = kinds.add_parser(
        "label_free",
        help=text,
        description=f"raysl benchmark label_free: {text}",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "encoders",
        nargs="+",
        metavar="RUN",
        help="run folders, encoder files or RUN/checkpoints/step-N; then data.source=... and "
        "evaluate.KEY=VALUE: the labelled images, and the settings of the protocols",
    )
    parser.add_argument(
        "--checkpoints", action="store_true", help="also use every saved checkpoint of each run"
    )
    parser.add_argument(
        "--no-untrained",
        action="store_true",
        help="do not add a randomly initialised encoder for each backbone",
    )
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    parser.add_argument(
        "--into",
        type=Path,
        help="Markdown file; its section 'label_free' receives table and figure",
    )
    parser.add_argument("--threads", type=whole, help="decoding threads (one for each core)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every encoder, then correlate.

    Raises:
        ConfigError: If a setting is wrong or a path holds no encoder.
        RayslError: If fewer than five encoders could be measured.
    """
    paths = [Path(word) for word in arguments.encoders if "=" not in word]
    overrides = [word for word in arguments.encoders if "=" in word]
    if not any(word.startswith("data.source=") for word in overrides):
        raise ConfigError("give the labelled images: data.source=cifar10, a folder or Parquet")
    config = validate(
        StudyConfig, resolved(apply_overrides(DEFAULTS, overrides)), where="label_free"
    )
    found = find_subjects(paths, checkpoints=arguments.checkpoints)
    config = config.model_copy(
        update={
            "data": absolute_config(config.data),
            "evaluate": absolute_config(config.evaluate),
        }
    )
    study = Study(config, num_threads=arguments.threads or os.cpu_count() or 1)
    say_notes(study.source, title=f"{study.source.name}:")
    began = time.monotonic()
    measured, failed = _measure_all(study, found, untrained=not arguments.no_untrained)
    groups = {name: correlations(rows) for name, rows in groups_of(measured).items()}
    if not groups.get("all"):
        raise RayslError(
            f"{len(measured)} encoders measured; a correlation needs five. "
            + "; ".join(f"{name}: {text}" for name, text in failed.items())
        )
    for table in _tables(measured, groups):
        console().print(table)
    if arguments.figure is not None:
        _draw(arguments.figure, measured, groups["all"])
    if arguments.into is not None:
        _write(arguments.into, measured, groups, command=shlex.join(overrides))
    if not arguments.no_untrained:
        say("encoders with random weights are among them (--no-untrained leaves them out)")
    return {
        "version": VERSION,
        "encoders": [each._asdict() for each in measured],
        "correlations": {name: [row._asdict() for row in rows] for name, rows in groups.items()},
        "failed": failed,
        "settings": config.model_dump(mode="json"),
        "seconds": time.monotonic() - began,
    }


def _measure_all(
    study: Study, found: Sequence[tuple[str, Path]], *, untrained: bool
) -> tuple[list[EncoderScores], dict[str, str]]:
    """Measure one after the other; what cannot be measured does not keep the rest from it."""
    measured: list[EncoderScores] = []
    failed: dict[str, str] = {}
    backbones: dict[str, Subject] = {}

    def measure(place: int, name: str, subject: Callable[[], Subject]) -> None:
        try:
            opened = subject()
            backbones.setdefault(f"{opened.backbone} {opened.size_px}", opened)
            row = study.measure(opened)
        except RayslError as error:
            failed[name] = str(error)
            say(f"  {name} failed: {error}")
            return
        measured.append(row)
        say(
            f"[{place}] {row.name}: linear {row.linear_top1:.1%}, "
            + ", ".join(f"{key} {value:.3g}" for key, value in row.measures.items())
            + f", {row.seconds:.1f} s"
        )

    for place, (name, path) in enumerate(found, 1):
        measure(place, name, lambda name=name, path=path: open_subject(name, path))  # type: ignore[misc]
    for place, like in enumerate([*backbones.values()] if untrained else [], len(found) + 1):
        measure(place, UNTRAINED, lambda like=like: untrained_like(like, seed=0))  # type: ignore[misc]
    return measured, failed


def _tables(measured: Sequence[EncoderScores], groups: dict[str, Any]) -> list[Table]:
    encoders = Table(title="Encoders by linear accuracy", title_justify="left")
    for name in ("encoder", "method", "linear", *DIRECTIONS):
        encoders.add_column(name, justify="left" if name in ("encoder", "method") else "right")
    for row in sorted(measured, key=lambda row: -row.linear_top1):
        values = [row.measures.get(name) for name in DIRECTIONS]
        texts = ["-" if value is None else f"{value:.3g}" for value in values]
        encoders.add_row(row.name, row.method, f"{row.linear_top1:.3f}", *texts)
    ranking = Table(
        title="Spearman's correlation with linear accuracy, 95 % interval", title_justify="left"
    )
    ranking.add_column("measure")
    for name, rows in groups.items():
        ranking.add_column(f"{name} ({rows[0].num_encoders})", justify="right")
    for measure in DIRECTIONS:
        cells = [
            next((interval_text(row) for row in rows if row.measure == measure), "-")
            for rows in groups.values()
        ]
        ranking.add_row(measure, *cells)
    return [encoders, ranking]


def _draw(path: Path, measured: Sequence[EncoderScores], relations: Sequence[Any]) -> None:
    draw_label_free(
        path,
        measured,
        relations,
        direction=DIRECTIONS,
        is_untrained=lambda point: point.method == UNTRAINED,
    )
    say(f"written: {path}")


def _write(
    path: Path, measured: Sequence[EncoderScores], groups: dict[str, Any], *, command: str
) -> None:
    picture = path.with_name("label_free.png")
    _draw(picture, measured, groups["all"])
    content = (
        f"{markdown_table(groups)}\n\n![Accuracy over each measure]({picture.name})\n\n"
        f"`raysl benchmark label_free RUN ... {command}`"
    )
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, replace_section(old, name=SECTION, content=content))
    say(f"written: {path}")
