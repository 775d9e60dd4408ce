"""Write the report of an evaluation: one HTML file with its table of protocols and its pictures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysl.downstream.evaluation_files import ARRAYS, RECORD, Evaluation, read_evaluation
from raysl.downstream.evaluation_pictures import confused_protocol, drawings_of, knn_settings
from raysl.downstream.evaluation_record import ProtocolResult
from raysl.errors import DataError, RayslError
from raysl.evaluate.features import EvalImages
from raysl.report.document import (
    collapsible,
    draw_each,
    escape,
    files_section,
    picture_html,
    section,
    write_page,
)
from raysl.run.pictures import read_method_pictures
from raysl.track.run_folder import RunFolder

REPORT = "report.html"
PICTURES = "pictures"

_FILES = (
    (RECORD, "the numbers of this page"),
    (ARRAYS, "features, labels, rows and predictions behind the pictures"),
    (PICTURES, "the pictures of this page"),
)

PROTOCOLS = {
    "knn": "Nearest neighbours",
    "linear": "Linear",
    "few_shot": "Few labels, linear",
    "finetune": "Fine-tuned",
    "semi_1": "Fine-tuned, 1\u00a0%",
    "semi_10": "Fine-tuned, 10\u00a0%",
    "transfer": "Transfer, linear",
}
"""Titles of the protocols; others are titled by their name."""

_IN_LEAD = ("knn", "linear", "finetune")

_MEASURES = {
    "rankme": ("RankMe", "effective number of dimensions, higher is better"),
    "alpha_req": ("alpha-ReQ", "decay of the spectrum, better near 1"),
    "alignment": ("Alignment", "distance of two views, lower is better"),
    "uniformity": ("Uniformity", "spread on the sphere, lower is better"),
    "feature_std": ("Spread of features", "0: collapsed, 1: even"),
}

_MAP = (
    "Test images with similar features lie close together; distances across the map and the "
    "directions of its axes have no meaning. Colours are labels, which the layout does not use; "
    "without labels, or with more than 20 classes, they are clusters of the features (k-means)."
)
_NEIGHBOURS = (
    "Test images (left, black frame), drawn at random, and their nearest training images with the "
    "cosine similarity."
)
_FRAMES = " Solid blue frames: the same class. Dashed red frames: another class."
_ATTENTION = (
    "Attention of the class token to each patch in the last block, from the lowest (dark) to the "
    "highest (bright), over the image in grey."
)
_SPECTRUM = (
    "Spectrum of the test images' features. A steep fall means that few directions hold the "
    "variance; "
    "RankMe is the effective number of directions. These numbers need no labels; how well they "
    "rank encoders differs by method and data: compare runs of one kind on the same images."
)
_BY_LABELS = (
    "The better an encoder, the less accuracy is lost with few labels. Error bars: standard "
    "deviation over seeds or draws."
)


def draw_evaluation(
    folder: Path,
    *,
    encoder: Path,
    train: EvalImages,
    test: EvalImages,
    shown: str | None = None,
) -> list[tuple[str, str]]:
    """Draw the pictures of an evaluation, then write its page.

    A picture that fails is missing from the page, and its previous file is removed; the others are
    still drawn.

    Args:
        folder: Contains ``evaluation.json`` and ``evaluation.npz``; receives ``pictures/*.png`` and
            ``report.html``.
        encoder: Path of ``encoder.safetensors``. If its run folder contains pictures by the method
            (reconstructions, attention), the page includes them.
        train: The training images of the evaluation, at the encoder's size.
        test: The test images.
        shown: The folder's address in a store, of which ``folder`` is a local copy.

    Returns:
        The name and the error of each picture, or of ``report``, that failed.
    """
    pictures = folder / PICTURES
    try:
        evaluation = read_evaluation(folder, train=train, test=test)
        drawings, failures = drawings_of(evaluation, encoder=encoder)
    except RayslError as error:
        return [("report", str(error))]
    for old in pictures.glob("*.png"):
        if old.stem not in drawings:
            old.unlink()
    failures += draw_each(pictures, drawings)
    try:
        sections = _sections(folder, evaluation, encoder, drawings)
        sections.append(files_section(folder.absolute(), [*_FILES], shown=shown))
        name = f"{encoder.absolute().parent.name}: {folder.absolute().name}"
        write_page(folder / REPORT, name=name, lead=_lead(evaluation), sections=sections)
    except Exception as error:  # a failed page must not end an evaluation
        failures.append(("report", f"{type(error).__name__}: {error}"))
    return failures


def _sections(
    folder: Path, evaluation: Evaluation, encoder: Path, drawings: Mapping[str, Any]
) -> list[str]:
    def shown(name: str, title: str, note: str) -> str:
        if name not in drawings:
            return ""
        return section(title, picture_html(folder / PICTURES, name, title), note)

    labelled = evaluation.test.is_labelled and evaluation.train.is_labelled
    return [
        _protocol_section(evaluation),
        shown("label_fraction", "Accuracy by number of labels", _BY_LABELS),
        shown("map", "Map of the features", _MAP),
        shown("neighbours", "Nearest neighbours", _NEIGHBOURS + (_FRAMES if labelled else "")),
        shown("mistakes", "Mistakes that the neighbours agree on", _about_mistakes(evaluation)),
        shown("confusion", "Confusions", _about_confusions(evaluation)),
        shown("attention", "Attention", _ATTENTION),
        *_method_sections(folder, encoder),
        shown("spectrum", "Spectrum of the features", _SPECTRUM) + _label_free(evaluation),
        _settings_section(evaluation),
    ]


def _lead(evaluation: Evaluation) -> str:
    record = evaluation.record
    names = [name for name in _IN_LEAD if name in evaluation.protocols] or evaluation.protocols
    best = [
        f"{_name(name, lower=True)} {_percent(evaluation.protocols[name])} %"
        for name in names
        if _number(evaluation.protocols[name].get("mean")) is not None
    ]
    where = Path(str(record.get("test_source", ""))).name
    images = f"{len(evaluation.test.labels):,} test images{f' of {escape(where)}' if where else ''}"
    bad = record.get("bad_images")
    black = f" ({bad:,} of all images are bad and replaced by black ones)" if bad else ""
    if not best:
        return f"Features of {images}{black}, without labels."
    return f"Top-1 accuracy on {images}{black}: {', '.join(best)}."


def _name(protocol: str, *, lower: bool = False) -> str:
    words = PROTOCOLS.get(protocol, protocol.replace("_", " "))
    return escape(words[:1].lower() + words[1:] if lower else words)


def _percent(measured: ProtocolResult) -> str:
    mean, std = _number(measured.get("mean")), _number(measured.get("deviation"))
    if mean is None:
        return "&ndash;"
    spread = f" &plusmn; {100 * std:.1f}" if std else ""
    return f"{100 * mean:.1f}{spread}"


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type] # mypy does not see the check


def _protocol_section(evaluation: Evaluation) -> str:
    if not evaluation.protocols:
        return ""
    heads = ("Protocol", "Top-1, %", "Time", "Images/s")
    rows = ["<tr>" + "".join(f"<th scope=col>{head}" for head in heads)]
    for name, measured in evaluation.protocols.items():
        seconds, speed = _number(measured.get("seconds")), _number(measured.get("images_per_s"))
        cells = (
            _percent(measured),
            "&ndash;" if seconds is None else _seconds(seconds),
            "&ndash;" if speed is None else f"{speed:,.0f}",
        )
        rows.append(f"<tr><th scope=row>{_name(name)}" + "".join(f"<td>{cell}" for cell in cells))
    table = "<div class=scroll><table class='numbers even'>\n" + "\n".join(rows)
    return section("Protocols", f"{table}\n</table></div>", _about_protocols(evaluation))


def _about_protocols(evaluation: Evaluation) -> str:
    """Describe the measured images, and the uncertainty of the accuracies."""
    num_train, num_test = len(evaluation.train.labels), len(evaluation.test.labels)
    classes = len(evaluation.class_names)
    text = (
        f"{num_train:,} labelled training images, {num_test:,} others to test, {classes:,} "
        "classes. Mean &plusmn; standard deviation over seeds or draws (see the settings); every "
        "test image counts."
    )
    embedding = evaluation.record.get("features")
    speed = _number(embedding and embedding.get("images_per_s"))
    seconds = _number(embedding and embedding.get("seconds"))
    if speed and seconds:
        text += f" Features took {_seconds(seconds)}, {speed:,.0f} images/s."
    means = [_number(measured.get("mean")) for measured in evaluation.protocols.values()]
    first = next((mean for mean in means if mean is not None), None)
    if first is not None and num_test:
        error = 100 * math.sqrt(first * (1 - first) / num_test)
        text += (
            f" With {num_test:,} test images, the standard error of {100 * first:.1f} % is "
            f"{error:.1f} percentage points."
        )
    return text


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _about_mistakes(evaluation: Evaluation) -> str:
    k, temperature = knn_settings(evaluation)
    return (
        f"Test images (left) whose {k} nearest neighbours (temperature {temperature:g}) agree most "
        "on a wrong class. Some have wrong labels, or near-duplicates with another label."
    )


def _about_confusions(evaluation: Evaluation) -> str:
    protocol = confused_protocol(evaluation)
    return (
        "" if protocol is None else f"Predictions of the protocol: {_name(protocol, lower=True)}."
    )


def _method_sections(folder: Path, encoder: Path) -> list[str]:
    """Return the sections of pictures that pretraining saved, such as reconstructions."""
    try:
        pictures = read_method_pictures(RunFolder(encoder.parent).method_pictures)
    except DataError:  # drawings_of reports it
        return []
    return [
        section(
            f"From pretraining: {escape(name.replace('_', ' '))}",
            picture_html(folder / PICTURES, f"method_{name}", escape(name)),
            escape(grid.caption) + " On training images.",
        )
        for name, grid in pictures.items()
    ]


def _label_free(evaluation: Evaluation) -> str:
    measured = evaluation.record.get("label_free") or {}
    rows = [
        f"<tr><th scope=row>{words}<td>{value:.3g}<td>{direction}"
        for key, (words, direction) in _MEASURES.items()
        if (value := _number(measured.get(key))) is not None
    ]
    if not rows:
        return ""
    return section(
        "Measured without labels",
        "<div class=scroll><table>\n" + "\n".join(rows) + "\n</table></div>",
    )


def _settings_section(evaluation: Evaluation) -> str:
    parts = []
    for name, measured in evaluation.protocols.items():
        settings: dict[str, Any] = {"version": measured.get("version")}
        settings |= measured.get("settings") or {}
        several = {"seeds": measured.get("seeds"), "values": measured.get("values")}
        settings |= {key: values for key, values in several.items() if values}
        rows = "\n".join(
            f"<tr><th scope=row>{escape(key)}<td>{escape(_value(value))}"
            for key, value in settings.items()
            if value is not None
        )
        table = f"<div class=scroll><table>\n{rows}\n</table></div>"
        version = escape(_value(measured.get("version")))
        parts.append(collapsible(f"{_name(name)}, version {version}", table))
    record = evaluation.record
    rows = "\n".join(
        f"<tr><th scope=row>{words}<td class=path>{escape(value)}"
        for words, value in (
            ("Encoder", record.get("encoder")),
            ("Training images", record.get("source")),
            ("Test images", record.get("test_source")),
        )
        if value
    )
    where = f"<table>\n{rows}\n</table>" if rows else ""
    return section("Settings", where + "\n".join(parts))


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
