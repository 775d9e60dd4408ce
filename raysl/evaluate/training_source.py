"""Open the training images of a run, with only the labels that its method may see."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from raysl.errors import DataError
from raysl.evaluate.labelled import has_test_set
from raysl.evaluate.protocol import EvaluateConfig
from raysl.methods.base import MethodConfig
from raysl.sources.labels import Rows, balanced_subset, hold_out
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, LabelsConfig, Source
from raysl.sources.subset import SubsetSource


def open_training_source(
    data: DataConfig, evaluate: EvaluateConfig, method: MethodConfig
) -> Source:
    """Open the training images of a run.

    Without a test set, some training images are held out for testing; no method sees their labels.

    Args:
        data: The settings of the training images and their labels.
        evaluate: The settings of the test images.
        method: The method to train.

    Raises:
        DataError: If the source has no usable image, or no labels although the method or
            ``data.labels`` requires them.
    """
    return seen_part(open_source(data, data=data), data, evaluate, method)


def seen_part(
    source: Source, data: DataConfig, evaluate: EvaluateConfig, method: MethodConfig
) -> Source:
    """Return the part of an opened source that :func:`open_training_source` would return."""
    config = None if data.labels == "none" else data.labels
    if config is None and not method.uses_labels:
        return source
    labels = source.labels()
    rows = np.flatnonzero(labels >= 0) if labels is not None else np.empty(0, np.int64)
    if labels is None or not len(rows):
        if config is None and not method.needs_labels:
            return source
        who = f"method {method.name}" if config is None else "data.labels"
        why = "".join(f"\n  {note}" for note in source.notes if "label" in note)
        raise DataError(f"{who} needs labels; {source.name} has none: {source.label_advice}{why}")
    seen = rows if has_test_set(evaluate, data, source) else hold_out(rows)[0]
    if not len(seen) and (method.needs_labels or config is not None):
        raise DataError(
            f"{source.name} has 1 labelled image, which is held out for testing; set "
            f"evaluate.source to other test images"
        )
    only = method.needs_labels or (config is not None and config.only)
    if config is None:
        everything = len(seen) == (len(labels) if only else len(rows))
        return source if everything else SubsetSource(source, seen, only=only)
    return SubsetSource(source, _chosen(labels, seen, config), only=only)


def _chosen(labels: Rows, seen: Rows, config: LabelsConfig) -> Rows:
    return seen[balanced_subset(labels[seen], fraction=config.fraction, seed=config.seed)]


def labels_record(
    source: Source, config: LabelsConfig | Literal["none"] | None
) -> Mapping[str, Any] | None:
    """Return the labels that a run sees, for ``labels.json``; None if it sees all or none.

    Args:
        source: The result of :func:`open_training_source`.
        config: The section ``data.labels``.
    """
    if config is None or config == "none" or not isinstance(source, SubsetSource):
        return None
    return {
        "source": source.name,
        "fingerprint": source.whole.fingerprint,
        "fraction": config.fraction,
        "seed": config.seed,
        "rows": source.labelled.tolist(),
    }
