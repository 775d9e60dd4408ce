"""Check before a sweep starts that its runs will measure its metric."""

import json
from collections.abc import Sequence
from typing import Any

from raysl.errors import DataError
from raysl.evaluate.labelled import Labelling, choose_labelled
from raysl.evaluate.online import LABEL_FREE
from raysl.report.terminal import say
from raysl.run.recipe import RunConfig
from raysl.sources.source import Source
from raysl.sources.subset import whole_source
from raysl.sweep.config import MetricConfig
from raysl.sweep.ray_trial import source_key


class MetricCheck:
    """Checks that runs have the labels that a sweep's metrics need.

    Args:
        metric: The metrics that the sweep compares and reports.
    """

    def __init__(self, metric: MetricConfig) -> None:
        self._metric = metric
        self._labellings: dict[str, Labelling] = {}
        self._missing: dict[str, None] = {}

    def check(self, config: RunConfig[Any], source: Source) -> None:
        """Check that a run has the labels that the sweep's metric needs.

        Args:
            config: The run's configuration.
            source: The run's training images.

        Raises:
            DataError: If labels are missing, with the reason and the remedy.
        """
        if not any(map(_needs_labels, (self._metric.name, *self._metric.also))):
            return
        labelling = self._labelling(config, source)
        reason = _missing_reason(self._metric.name, labelling)
        if reason is not None:
            raise DataError(
                f"metric.name={self._metric.name}: {reason}\n  Set evaluate.source to labelled "
                f"images, or metric.name to one that needs no labels, such as eval/{LABEL_FREE[0]}"
            )
        for name in self._metric.also:
            if (reason := _missing_reason(name, labelling)) is not None:
                self._missing[f"metric.also: no {name}: {reason}"] = None

    def say_notes(self) -> None:
        """Print a note for each metric of ``also`` that will not be measured."""
        for line in self._missing:
            say(line)

    def _labelling(self, config: RunConfig[Any], source: Source) -> Labelling:
        """Return the labelled images of a run; runs with equal settings share them."""
        key = source_key(config) + json.dumps(config.evaluate.model_dump(mode="json"))
        if key not in self._labellings:
            self._labellings[key] = choose_labelled(
                config.evaluate, config.data, whole_source(source)
            )
        return self._labellings[key]


def _needs_labels(name: str) -> bool:
    label_free: Sequence[str] = [f"eval/{each}" for each in LABEL_FREE]
    return name.startswith(("eval/", "final/")) and name not in label_free


def _missing_reason(name: str, labelling: Labelling) -> str | None:
    """Return why a metric cannot be measured on these labelled images, or None."""
    if not _needs_labels(name):
        return None
    if labelling.train is None or ("few_shot" in name and not labelling.few_shot):
        return "; ".join(labelling.notes) or "there are no labels"
    return None
