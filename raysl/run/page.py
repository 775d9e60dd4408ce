"""Write the report of a run: one self-contained HTML file that loads nothing from the network."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from raysl.config.yaml_text import to_yaml
from raysl.errors import DataError
from raysl.evaluate.registry import PROTOCOLS
from raysl.exchange.library_lines import encoder_lines
from raysl.report.document import (
    collapsible,
    draw_each,
    escape,
    files_section,
    picture_html,
    section,
    write_page,
)
from raysl.run.pictures import (
    accuracy,
    draw_accuracy,
    draw_curves,
    draw_grid,
    draw_map,
    draw_views,
    measured_encoders,
    percent,
    probe_name,
    read_method_pictures,
)
from raysl.run.recipe import Derived, RunConfig
from raysl.sources.source import Source
from raysl.track.results import TRAINING, Features, Results, Score, measured_probes, score_of
from raysl.track.run_folder import RunFolder, read_metrics

_FILES = (
    ("config.yaml", "the run, every setting resolved"),
    ("metrics.jsonl", "one line of numbers per logging step"),
    ("results.json", "the accuracies above"),
    ("encoder.safetensors", "the encoder's weights under torchvision's names"),
    ("method_pictures.npz", "pictures that the method makes of a few training images"),
    (
        "projection_head.safetensors",
        "the projection head; fine-tuning can start from any of its layers",
    ),
    ("classifier.safetensors", "encoder and classifier, for <code>raysl.load_classifier</code>"),
    ("labels.json", "which training images were used with their labels"),
    ("protocols", "the runs that fine-tuned a copy of the encoder"),
    ("features.npz", "features, labels and small images behind the map"),
    ("checkpoints", "the complete state of training, to resume from"),
    ("events.jsonl", "what happened besides training, such as resumes"),
    ("pictures", "the pictures of this page"),
    ("mlflow.json", "the MLflow run that tracks this run"),
)


def draw_all(
    folder: RunFolder, *, source: Source, config: RunConfig[Any], derived: Derived
) -> list[tuple[str, str]]:
    """Draw the pictures of a run, then write its page.

    Thread-safe. A picture that fails is missing from the page, and its previous file is removed;
    the others are still drawn.

    Args:
        folder: Contains ``metrics.jsonl``, and for a finished run ``results.json`` and
            ``features.npz``; receives ``pictures/*.png`` and ``report.html``.
        source: The training images.
        config: The run's configuration.
        derived: The run's derived values.

    Returns:
        The name and the error of each picture, or of ``report``, that failed.
    """
    results = folder.read_results() or Results()
    drawings: dict[str, Callable[[Path], None]] = {
        "views": lambda path: draw_views(
            path, source=source, views=config.data.views.views(), seed=config.seed
        ),
        "curves": lambda path: draw_curves(path, read_metrics(folder.metrics)),
    }
    if _has_map(folder, config):
        drawings["map"] = lambda path: _draw_map_of(folder, path)
    else:
        (folder.pictures / "map.png").unlink(missing_ok=True)
    if measured_probes(results):
        drawings["accuracy"] = lambda path: draw_accuracy(path, results)
    failures = []
    try:
        for name, grid in read_method_pictures(folder.method_pictures).items():
            drawings[f"method_{name}"] = partial(draw_grid, grid=grid)
    except DataError as error:
        failures.append(("method_pictures", str(error)))
    failures += draw_each(folder.pictures, drawings)
    try:
        write_report(folder, config=config, derived=derived)
    except Exception as error:
        failures.append(("report", f"{type(error).__name__}: {error}"))
    return failures


def _has_map(folder: RunFolder, config: RunConfig[Any]) -> bool:
    """Return whether a run saves features for a map; a run that only measures kNN saves none."""
    return folder.features.exists() or not config.evaluate.is_quick


def _draw_map_of(folder: RunFolder, path: Path) -> None:
    if not folder.features.exists():
        raise DataError(f"{folder.features}: missing; a finished run writes it")
    with np.load(folder.features, allow_pickle=False) as arrays:
        draw_map(
            path,
            features=arrays["features"],
            labels=arrays["labels"],
            class_names=arrays["class_names"].tolist(),
            thumbnails=arrays["thumbnails"],
        )


def write_report(folder: RunFolder, *, config: RunConfig[Any], derived: Derived) -> Path:
    """Write ``report.html``: summary, accuracy, pictures, settings, how to use the encoder.

    Args:
        folder: The run folder; a note replaces missing pictures and results.
        config: The run's configuration.
        derived: The run's derived values.

    Returns:
        Path of the page, which is written atomically.
    """
    results = folder.read_results() or Results()
    pictures = folder.pictures
    curves = picture_html(pictures, "curves", "Metrics over the optimizer step")
    sections = [
        _accuracy_section(folder, config, results),
        section("Training", curves, _CURVES),
        section("What the method saw", picture_html(pictures, "views", "Images, views"), _VIEWS),
        _method_section(folder),
        section("Map of the features", picture_html(pictures, "map", "Map"), _MAP)
        if _has_map(folder, config)
        else "",
        _encoder_section(config),
        _settings_section(config, derived),
        files_section(folder.path, _FILES, shown=folder.shown()),
    ]
    lead = _summary(config, derived, results)
    write_page(folder.report, name=config.name, lead=lead, sections=sections)
    return folder.report


_CURVES = (
    "Faint lines are single logging steps, strong lines their running mean. If the spread of the "
    "features falls to 0, they are the same for every image: training has collapsed."
)
_VIEWS = "Training images, evenly spaced over the source, and their views in epoch 0."
_MAP = (
    "Images with similar features lie close together; distances across the map and the directions "
    "of its axes have no meaning. Labels only set the colours: the layout does not use them."
)

# The probe that summarises a run is the first one that was measured.
_HEADLINES = {
    "linear_lbfgs": "a linear classifier on its features reaches",
    "linear": "a linear classifier on its features reaches",
    "knn": "the nearest neighbours of its features reach",
}


def _summary(config: RunConfig[Any], derived: Derived, results: Results) -> str:
    epochs = derived.total_steps / derived.steps_per_epoch
    if config.method.classifies:
        return _classifier_summary(config, derived, results)
    sentence = (
        f"{escape(config.method.name)} pretrained a {escape(config.backbone.name)} for "
        f"{epochs:,.4g} epoch{'' if epochs == 1 else 's'} on {derived.num_images:,} images of "
        f"{escape(config.data.source)}, without labels"
    )
    probe, score = _headline(results)
    if score is None:
        why_unknown = (
            "there are no labels to measure it with, or too few"
            if results
            else "the run has no results yet"
        )
        return f"{sentence}; its accuracy is not known: {why_unknown}."
    untrained = score_of(results, probe, "untrained_")
    than = "" if untrained is None else f", against {100 * untrained.mean:.1f} % before training"
    return f"{sentence}; {_HEADLINES[probe]} {100 * score.mean:.1f} % top-1 accuracy{than}."


def _headline(results: Results) -> tuple[str, Score | None]:
    """Return the name and the score of the probe that summarises the run; "" and None without."""
    probe = next((name for name in _HEADLINES if f"{name}_top1" in results), "")
    return probe, score_of(results, probe) if probe else None


def _classifier_summary(config: RunConfig[Any], derived: Derived, results: Results) -> str:
    epochs = derived.total_steps / derived.steps_per_epoch
    sentence = (
        f"A {escape(config.backbone.name)} learnt to classify (method "
        f"{escape(config.method.name)}) in {epochs:,.4g} epoch{'' if epochs == 1 else 's'} of "
        f"{derived.num_images:,} images of {escape(config.data.source)}"
    )
    result = percent(results.get("top1"))
    if result is None:
        return f"{sentence}; its accuracy is not known."
    count = results.get("num_test_labels")
    images = "the" if count is None else _number(count)
    return f"{sentence}; it reaches {result:.1f} % top-1 accuracy on {images} test images."


def _accuracy_section(folder: RunFolder, config: RunConfig[Any], results: Results) -> str:
    if not measured_probes(results):
        return ""
    probes = measured_probes(results)
    heads = "".join(f"<th scope=col>{escape(probe_name(probe, results))}" for probe in probes)
    rows = [f"<tr><th scope=col>Top-1, %{heads}"]
    for features, name in measured_encoders(results):
        cells = "".join(f"<td>{_accuracy_cell(results, features, probe)}" for probe in probes)
        rows.append(f"<tr><th scope=row>{escape(name)}{cells}")
    table = "<div class=scroll><table class=numbers>\n" + "\n".join(rows) + "\n</table></div>"
    bars = picture_html(folder.pictures, "accuracy", "Accuracies as bars")
    return section("Accuracy of the frozen features", table + bars, _protocol(config, results))


def _method_section(folder: RunFolder) -> str:
    """Return the section of the method's pictures; empty if it has none."""
    try:
        pictures = read_method_pictures(folder.method_pictures)
    except DataError:  # draw_all reports it
        return ""
    return "\n".join(
        section(
            escape(name.replace("_", " ").capitalize()),
            picture_html(folder.pictures, f"method_{name}", escape(name)),
            escape(grid.caption),
        )
        for name, grid in pictures.items()
    )


def _accuracy_cell(results: Results, features: Features, probe: str) -> str:
    result = accuracy(results, features, probe)
    if result is None:
        return "&ndash;"
    value, std = result
    return f"{value:.1f}" if std is None else f"{value:.1f} &plusmn; {std:.1f}"


def _protocol(config: RunConfig[Any], results: Results) -> str:
    """Describe the settings and the images of the accuracies."""
    weights = config.backbone.weights
    start = "random weights" if weights is None else f"the weights of {escape(weights)}"
    sentences = [f"Networks are frozen and see centred images of {config.image_size_px} px."]
    if any(features == "untrained_" for features, _ in measured_encoders(results)):
        sentences.insert(0, f"Before training, the same network has {start}.")
    keys = ("num_train_labels", "num_test_labels", "num_classes")
    counts = [results.get(key) for key in keys]
    if None not in counts:  # a run that only measures nearest neighbours stores no counts
        num_train, num_test, num_classes = map(_number, counts)
        sentences.append(
            f"{num_train} labelled images train the probes, {num_test} others of {num_classes} "
            f"classes test them."
        )
    sentences += _probe_sentences(config, results)
    for name in TRAINING:
        if (tuned := score_of(results, name)) is not None:
            labels = _number(cast(Mapping[str, Any], results).get(f"{name}_labels"))
            layers = getattr(config.evaluate, name).head_layers
            sentences.append(
                f"Fine-tuned on {labels} of the labels, from layer {layers} of the projection head "
                f"(0: the encoder alone), it reaches {100 * tuned.mean:.1f} % top-1 accuracy."
            )
    score, count = _headline(results)[1], results.get("num_test_labels")
    if score is not None and count:
        error = 100 * math.sqrt(score.mean * (1 - score.mean) / count)
        sentences.append(
            f"With {_number(count)} test images, the standard error of {100 * score.mean:.1f} % "
            f"is {error:.1f} percentage points."
        )
    return " ".join(sentences)


# Result keys of earlier versions, which stored these settings instead of the protocols' texts.
_LEGACY_SETTINGS = {
    "knn": {"k": "knn_k", "temperature": "knn_temperature"},
    "few_shot": {"labels_per_class": "few_shot_labels", "draws": "few_shot_draws"},
}


def _probe_sentences(config: RunConfig[Any], results: Results) -> Iterator[str]:
    """Yield a sentence on the settings of each protocol."""
    texts, values = results.get("protocols", {}), cast(Mapping[str, Any], results)
    for probe in measured_probes(results):
        names = _LEGACY_SETTINGS.get(probe, {}).items()
        stored = {
            name: values[key] for name, key in names if isinstance(values.get(key), int | float)
        }
        settings = getattr(config.evaluate, probe).model_copy(update=stored)
        text = texts.get(probe) or PROTOCOLS[probe].text(settings)
        yield f"{escape(probe_name(probe, results))}: {escape(text)}."


def _encoder_section(config: RunConfig[Any]) -> str:
    data = config.data
    lines = encoder_lines(config.backbone, image_size_px=config.image_size_px)
    text = (
        f"Its input is RGB in [0, 1], minus the mean ({_numbers(data.mean)}), divided by the "
        f"standard deviation ({_numbers(data.std)}); it was evaluated at {config.image_size_px} px."
    )
    return section("Use the encoder", f"<pre>{escape(chr(10).join(lines))}</pre>", text)


def _settings_section(config: RunConfig[Any], derived: Derived) -> str:
    text = to_yaml(config.model_dump(mode="json"))
    rows = "\n".join(
        f"<tr><th scope=row>{escape(key)}<td>{_number(value)}"
        for key, value in derived._asdict().items()
    )
    table = f"<div class=scroll><table>\n{rows}\n</table></div>"
    configuration = collapsible("Configuration, every value resolved", f"<pre>{escape(text)}</pre>")
    derived_values = collapsible("Values derived from the configuration", table)
    return section("Settings", f"{configuration}\n{derived_values}")


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else escape(value)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
