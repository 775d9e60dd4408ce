"""The report of a run: one HTML file that holds everything and asks the network for nothing."""

import base64
import html
import math
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raysl.config.load import to_yaml
from raysl.errors import DataError
from raysl.recipe import Derived, RunConfig
from raysl.report.encoder_lines import encoder_lines
from raysl.report.pictures import (
    ENCODERS,
    PROBES,
    accuracy,
    draw_accuracy,
    draw_curves,
    draw_grid,
    draw_map,
    draw_views,
    has_accuracy,
    probe_name,
    read_method_pictures,
)
from raysl.report.style import STYLE
from raysl.sources.source import Source
from raysl.track.run_folder import RunFolder, read_metrics, write_atomically

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_FILES = (
    ("config.yaml", "the run, every setting resolved"),
    ("metrics.jsonl", "one line of numbers a logging step"),
    ("results.json", "the accuracies above"),
    ("encoder.safetensors", "the encoder's weights under torchvision's names"),
    ("method_pictures.npz", "what the method makes of a few images"),
    ("finetune_labels.json", "rows of the training images whose labels fine-tuning saw"),
    ("features.npz", "features, labels and small images behind the map"),
    ("checkpoints", "the whole state of training, to go on from"),
    ("pictures", "the pictures of this page"),
    ("mlflow.json", "which MLflow run this is"),
)


def draw_all(
    folder: RunFolder, *, source: Source, config: RunConfig[Any], derived: Derived
) -> list[tuple[str, str]]:
    """Draw the pictures of a run, then the page that holds them.

    Safe in a thread beside others. What cannot be drawn does not keep the rest from being drawn:
    its picture is missing from the page, and an old one is removed.

    Args:
        folder: Holds ``metrics.jsonl``, and of a finished run ``results.json`` and
            ``features.npz``; gets ``pictures/*.png`` and ``report.html``.
        source: The training images.
        config: The run.
        derived: What follows from it.

    Returns:
        The name and the error of each picture that was not drawn, or of ``report``.
    """
    results = folder.read_results() or {}
    drawings: dict[str, Callable[[Path], None]] = {
        "views": lambda path: draw_views(
            path, source=source, views=config.data.views.views(), seed=config.seed
        ),
        "curves": lambda path: draw_curves(path, read_metrics(folder.metrics)),
        "map": lambda path: _draw_map_of(folder, path),
    }
    if has_accuracy(results):
        drawings["accuracy"] = lambda path: draw_accuracy(path, results)
    failures = []
    try:
        for name, grid in read_method_pictures(folder.method_pictures).items():
            drawings[f"method_{name}"] = partial(draw_grid, grid=grid)
    except DataError as error:
        failures.append(("method_pictures", str(error)))
    for name, draw in drawings.items():
        path = folder.pictures / f"{name}.png"
        try:
            draw(path)
        except Exception as error:  # a run is not lost for the sake of a picture
            path.unlink(missing_ok=True)
            failures.append((name, f"{type(error).__name__}: {error}"))
    try:
        write_report(folder, config=config, derived=derived)
    except Exception as error:
        failures.append(("report", f"{type(error).__name__}: {error}"))
    return failures


def _draw_map_of(folder: RunFolder, path: Path) -> None:
    if not folder.features.exists():
        raise DataError(f"{folder.features}: not there; a finished run writes it")
    with np.load(folder.features, allow_pickle=False) as kept:
        draw_map(
            path,
            features=kept["features"],
            labels=kept["labels"],
            class_names=kept["class_names"].tolist(),
            thumbnails=kept["thumbnails"],
        )


def write_report(folder: RunFolder, *, config: RunConfig[Any], derived: Derived) -> Path:
    """Write ``report.html``: summary, accuracy, pictures, settings, how to use the encoder.

    Args:
        folder: The run; a picture or result that is not there is left out, with a word about it.
        config: The run.
        derived: What follows from it.

    Returns:
        The file, which is either old or new, never half.
    """
    results = folder.read_results() or {}
    name = html.escape(config.name)
    sections = [
        f"<h1>{name}</h1>\n<p class=lead>{_summary(config, derived, results)}</p>",
        _accuracy_section(folder, config, results),
        _section(
            "Training", _picture(folder, "curves", "Metrics over the optimizer step"), _CURVES
        ),
        _section("What the method saw", _picture(folder, "views", "Images and views"), _VIEWS),
        _method_section(folder),
        _section("Map of the features", _picture(folder, "map", "Map of the features"), _MAP),
        _encoder_section(config),
        _settings_section(config, derived),
        _files_section(folder),
    ]
    page = (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">\n'
        f"<title>{name} - raysl</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_atomically(folder.report, page)
    return folder.report


_CURVES = (
    "Faint lines are single logging steps, strong ones their running mean. Features whose spread "
    "falls to 0 are the same for every image: training has collapsed."
)
_VIEWS = "Training images, spread evenly over the source, and their views in epoch 0."
_MAP = (
    "Images that the encoder finds alike lie close together; distances across the map and the "
    "directions of its axes mean nothing. Labels only colour it: the layout never saw them."
)


def _summary(config: RunConfig[Any], derived: Derived, results: Mapping[str, Any]) -> str:
    epochs = derived.total_steps / derived.steps_per_epoch
    sentence = (
        f"{_escape(config.method.name)} pretrained a {_escape(config.backbone.name)} for "
        f"{epochs:,.4g} epoch{'' if epochs == 1 else 's'} on {derived.num_images:,} images of "
        f"{_escape(config.data.source)}, without labels"
    )
    linear = accuracy(results, "linear_top1")
    if linear is None:
        known = (
            "there are no labels to measure it with" if results else "the run has no results yet"
        )
        return f"{sentence}; its accuracy is not known: {known}."
    untrained = accuracy(results, "untrained_linear_top1")
    than = "" if untrained is None else f", against {untrained[0]:.1f} % before training"
    return f"{sentence}; a linear classifier on its features is right in {linear[0]:.1f} %{than}."


def _accuracy_section(folder: RunFolder, config: RunConfig[Any], results: Mapping[str, Any]) -> str:
    if not has_accuracy(results):
        return ""
    heads = "".join(f"<th scope=col>{_escape(probe_name(probe, results))}" for probe in PROBES)
    rows = [f"<tr><th scope=col>Top-1, %{heads}"]
    for prefix, name in ENCODERS:
        cells = "".join(f"<td>{_accuracy_cell(results, prefix + probe)}" for probe in PROBES)
        rows.append(f"<tr><th scope=row>{_escape(name)}{cells}")
    table = "<div class=scroll><table class=numbers>\n" + "\n".join(rows) + "\n</table></div>"
    picture = _picture(folder, "accuracy", "Accuracies as bars")
    return _section("Accuracy of the frozen features", table + picture, _protocol(config, results))


def _method_section(folder: RunFolder) -> str:
    """Show what the method makes of a few images, where it has something to show."""
    try:
        pictures = read_method_pictures(folder.method_pictures)
    except DataError:  # told when it could not be drawn
        return ""
    return "\n".join(
        _section(
            _escape(name.replace("_", " ").capitalize()),
            _picture(folder, f"method_{name}", _escape(name)),
            _escape(grid.caption),
        )
        for name, grid in pictures.items()
    )


def _accuracy_cell(results: Mapping[str, Any], key: str) -> str:
    found = accuracy(results, key)
    if found is None:
        return "&ndash;"
    value, deviation = found
    return f"{value:.1f}" if deviation is None else f"{value:.1f} &plusmn; {deviation:.1f}"


def _protocol(config: RunConfig[Any], results: Mapping[str, Any]) -> str:
    """Say with which settings and on how many images the accuracies were measured."""
    evaluate = config.evaluate
    settings: dict[str, Any] = {
        "num_train_labels": None,
        "num_test_labels": None,
        "num_classes": None,
        "knn_k": evaluate.knn_k,
        "knn_temperature": evaluate.knn_temperature,
        "few_shot_labels": evaluate.few_shot_labels,
        "few_shot_draws": evaluate.few_shot_draws,
    }
    known = {key: _number(results.get(key, value)) for key, value in settings.items()}
    weights = config.backbone.weights
    start = "random weights" if weights is None else f"the weights of {_escape(weights)}"
    text = (
        f"Before training, the same network has {start}. Networks are frozen and see centred "
        f"images of {config.image_size_px} px. {known['num_train_labels']} labelled images train "
        f"the probes, {known['num_test_labels']} others of {known['num_classes']} classes test "
        f"them. Nearest neighbours: k = {known['knn_k']}, temperature {known['knn_temperature']}, "
        f"cosine similarity. Linear: logistic regression, C = {evaluate.inverse_penalty:g}. Few "
        f"labels: {known['few_shot_labels']} a class, mean &plusmn; standard deviation of "
        f"{known['few_shot_draws']} draws."
    )
    tuned = accuracy(results, "finetune_top1")
    if tuned is not None and evaluate.finetune is not None:
        text += (
            f" Fine-tuned on {_number(results.get('finetune_labels'))} of the labels, from layer "
            f"{evaluate.finetune.head_layers} of the projection head (0: the encoder alone), it is "
            f"right in {tuned[0]:.1f} %."
        )
    linear, num_test = accuracy(results, "linear_top1"), results.get("num_test_labels")
    if linear is None or not num_test:
        return text
    share = linear[0] / 100
    error = 100 * math.sqrt(share * (1 - share) / num_test)
    return f"{text} With so many test images, the standard error of {linear[0]:.1f} is {error:.1f}."


def _encoder_section(config: RunConfig[Any]) -> str:
    data = config.data
    lines = encoder_lines(config.backbone, image_size_px=config.image_size_px)
    text = (
        f"It takes RGB images in [0, 1], minus the mean ({_numbers(data.mean)}), over the "
        f"deviation ({_numbers(data.std)}); it was evaluated at {config.image_size_px} px."
    )
    return _section("Use the encoder", f"<pre>{_escape(chr(10).join(lines))}</pre>", text)


def _settings_section(config: RunConfig[Any], derived: Derived) -> str:
    text = to_yaml(config.model_dump(mode="json"))
    rows = "\n".join(
        f"<tr><th scope=row>{_escape(key)}<td>{_number(value)}"
        for key, value in derived._asdict().items()
    )
    return _section(
        "Settings",
        f"<details><summary>Configuration, every value resolved</summary><pre>{_escape(text)}</pre>"
        f"</details>\n<details><summary>What follows from it</summary><div class=scroll>"
        f"<table>\n{rows}\n</table></div></details>",
    )


def _files_section(folder: RunFolder) -> str:
    rows = "\n".join(
        f"<tr><th scope=row><code>{name}</code><td>{what}"
        for name, what in _FILES
        if (folder.path / name).exists()
    )
    where = f"<p class=path><code>{_escape(folder.path)}</code></p>"
    return _section("Files", f"{where}<div class=scroll><table>\n{rows}\n</table></div>")


def _section(title: str, content: str, note: str = "") -> str:
    after = f"\n<p class=note>{note}</p>" if note else ""
    return f"<section>\n<h2>{title}</h2>\n{content}{after}\n</section>"


def _picture(folder: RunFolder, name: str, alt: str) -> str:
    """Return the picture inside the page, two of its pixels as one of the page."""
    try:
        data = (folder.pictures / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of the PNG's first chunk
    except (OSError, struct.error):
        return f"<p class=note>This picture was not drawn (pictures/{name}.png).</p>"
    encoded = base64.b64encode(data).decode("ascii")
    return (
        f'<img alt="{alt}" width={width // 2} height={height // 2} '
        f'src="data:image/png;base64,{encoded}">'
    )


def _escape(value: object) -> str:
    return html.escape(str(value))


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else _escape(value)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
