"""Choose the pictures of an evaluation and draw each."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.downstream.attention import NUM_IMAGES, draw_attention
from raysl.downstream.confusion import draw_confusion
from raysl.downstream.evaluation_files import Evaluation
from raysl.downstream.label_fraction import AccuracyPoint, accuracy_points, draw_by_labels
from raysl.downstream.neighbour_grid import draw_mistakes, draw_neighbours
from raysl.downstream.spectrum import draw_spectrum
from raysl.encoder.file import load_encoder, read_description
from raysl.errors import DataError
from raysl.nn.backbones import Backbone
from raysl.nn.vit import VisionTransformer
from raysl.report.feature_map import MAX_NAMED_CLASSES, cluster_labels, draw_map
from raysl.run.pictures import draw_grid, read_method_pictures
from raysl.track.run_folder import RunFolder

KNN_K, KNN_TEMPERATURE = 20, 0.07
"""DINO's settings of the vote, used if the evaluation has none."""

NUM_CLUSTERS = 10

_MAP_IMAGES = 1500
_MAP_PX = 96
_BEST_FIRST = ("linear", "finetune", "knn")  # order of preference for the confusions

Drawings = dict[str, Callable[[Path], None]]


def drawings_of(evaluation: Evaluation, *, encoder: Path) -> tuple[Drawings, list[tuple[str, str]]]:
    """Return the drawing functions of an evaluation's pictures, by name, and early errors.

    Args:
        evaluation: The evaluation.
        encoder: Path of ``encoder.safetensors``; its run folder, if any, may contain pictures by
            the method.
    """
    labelled = evaluation.test.is_labelled and evaluation.train.is_labelled
    drawings: Drawings = {}
    points = labelled_points(evaluation)
    if len({point.num_labels for point in points}) > 1:
        drawings["label_fraction"] = partial(draw_by_labels, points=points)
    drawings["map"] = partial(_draw_map, evaluation=evaluation)
    drawings["neighbours"] = partial(draw_neighbours, evaluation=evaluation)
    if labelled:
        k, temperature = knn_settings(evaluation)
        drawings["mistakes"] = partial(
            draw_mistakes, evaluation=evaluation, k=k, temperature=temperature
        )
        if confused_protocol(evaluation) is not None:
            drawings["confusion"] = partial(_draw_confusion, evaluation=evaluation)
    problems: list[tuple[str, str]] = []
    try:
        network = _vision_transformer(encoder)
        if network is not None:
            drawings["attention"] = partial(
                _draw_attention, evaluation=evaluation, encoder=encoder, net=network
            )
    except Exception as error:  # the page is written without it
        problems.append(("attention", f"{type(error).__name__}: {error}"))
    try:
        for name, grid in read_method_pictures(RunFolder(encoder.parent).method_pictures).items():
            drawings[f"method_{name}"] = partial(draw_grid, grid=grid)
    except DataError as error:
        problems.append(("method_pictures", str(error)))
    drawings["spectrum"] = partial(_draw_spectrum, evaluation=evaluation)
    return drawings, problems


def labelled_points(evaluation: Evaluation) -> list[AccuracyPoint]:
    """Return the accuracies of the evaluation by number of labels."""
    labels = evaluation.train.labels
    labels = labels[labels >= 0]
    return accuracy_points(
        evaluation.protocols, num_train=len(labels), num_classes=len(np.unique(labels))
    )


def knn_settings(evaluation: Evaluation) -> tuple[int, float]:
    """Return k and temperature of the nearest-neighbour protocol, or DINO's."""
    knn = evaluation.protocols.get("knn")
    settings = (knn and knn.get("settings")) or {}
    k, temperature = settings.get("k"), settings.get("temperature")
    return int(k or KNN_K), float(temperature or KNN_TEMPERATURE)


def confused_protocol(evaluation: Evaluation) -> str | None:
    """Return the protocol whose confusions are drawn: first linear, finetune or knn; else None."""
    named = [name for name in _BEST_FIRST if name in evaluation.predictions]
    return next(iter([*named, *evaluation.predictions]), None)


def _draw_map(path: Path, evaluation: Evaluation) -> None:
    test = evaluation.test
    indices = test.subset(_MAP_IMAGES)
    if not len(indices):
        raise DataError("no image has finite features to draw")
    features, labels = test.features[indices], test.labels[indices]
    names, colors = evaluation.class_names, ""
    num_classes = len(np.unique(labels[labels >= 0]))
    if not 0 < num_classes <= MAX_NAMED_CLASSES:
        labels = cluster_labels(features, num_clusters=NUM_CLUSTERS)
        names, colors = [f"cluster {number + 1}" for number in range(NUM_CLUSTERS)], "by cluster"
    draw_map(
        path,
        features=features,
        labels=labels,
        class_names=names,
        thumbnails=test.thumbnails(indices, most_px=_MAP_PX),
        colors=colors,
    )


def _draw_confusion(path: Path, evaluation: Evaluation) -> None:
    protocol = confused_protocol(evaluation)
    assert protocol is not None
    draw_confusion(
        path, evaluation.test.labels, evaluation.predictions[protocol], evaluation.class_names
    )


def _draw_spectrum(path: Path, evaluation: Evaluation) -> None:
    draw_spectrum(path, evaluation.test.features)


def _vision_transformer(encoder: Path) -> VisionTransformer | None:
    backbone = load_encoder(encoder)
    net = backbone.net if isinstance(backbone, Backbone) else None
    return net if isinstance(net, VisionTransformer) else None


def _draw_attention(
    path: Path, evaluation: Evaluation, encoder: Path, net: VisionTransformer
) -> None:
    description = read_description(encoder)
    mean, std = (torch.tensor(description[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def to_input(pixels: npt.NDArray[np.uint8]) -> Tensor:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        normalised: Tensor = (images - mean) / std
        return normalised

    indices = evaluation.test.subset(NUM_IMAGES)
    pixels = np.concatenate(list(evaluation.test.images.batches(indices)))
    draw_attention(path, net, pixels, to_input=to_input)
