"""Open the labelled images that a run is measured on, and note what is missing."""

from typing import Any

from raysl.evaluate.labelled import Labelling, choose_labelled, open_labelled
from raysl.evaluate.protocol import LabelledSets
from raysl.run.recipe import RunConfig
from raysl.sources.source import Source
from raysl.sources.subset import whole_source


def labelling_of(config: RunConfig[Any], source: Source) -> Labelling:
    """Choose the labelled images that a run is measured with, and note what is missing.

    Labels of training and test images are read; no image is decoded.

    Raises:
        DataError: If the labels do not fit the section ``evaluate``, as in :func:`open_sets`.
    """
    evaluate = config.evaluate
    if config.method.classifies:  # no probes are trained
        evaluate = evaluate.model_copy(update={"final": ("knn",)})
    return choose_labelled(evaluate, config.data, whole_source(source))


def open_sets(config: RunConfig[Any], source: Source, *, num_threads: int) -> LabelledSets | None:
    """Open the labelled images that a run is measured on; None if nothing can be measured."""
    return open_labelled(
        config.evaluate,
        config.data,
        whole_source(source),
        size_px=config.image_size_px,
        num_threads=num_threads,
    )
