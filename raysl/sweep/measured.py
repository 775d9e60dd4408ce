"""Check before a sweep starts that its runs will measure the metric that compares them."""

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
    """What can be measured on the labelled images that runs have.

    Args:
        metric: What decides between the sweep's trials, and what is shown beside it.
    """

    def __init__(self, metric: MetricConfig) -> None:
        self._metric = metric
        self._labellings: dict[str, Labelling] = {}
        self._missing: dict[str, None] = {}

    def look(self, config: RunConfig[Any], source: Source) -> None:
        """Refuse a run that has no labels for the metric that decides.

        Args:
            config: The run.
            source: Its training images.

        Raises:
            DataError: Says why it is not measured, and what to do.
        """
        if not any(map(_needs_labels, (self._metric.name, *self._metric.also))):
            return
        labelling = self._labelling(config, source)
        why = _unmeasured(self._metric.name, labelling)
        if why is not None:
            raise DataError(
                f"metric.name={self._metric.name}: {why}\n  Set evaluate.source to labelled "
                f"images, or metric.name to what needs no labels, such as eval/{LABEL_FREE[0]}"
            )
        for name in self._metric.also:
            if (why := _unmeasured(name, labelling)) is not None:
                self._missing[f"metric.also: no {name}: {why}"] = None

    def say_notes(self) -> None:
        """Say what will not stand beside the metric, each once."""
        for line in self._missing:
            say(line)

    def _labelling(self, config: RunConfig[Any], source: Source) -> Labelling:
        """Return what a run is measured on; sets that many runs share are looked at once."""
        key = source_key(config) + json.dumps(config.evaluate.model_dump(mode="json"))
        if key not in self._labellings:
            found = choose_labelled(config.evaluate, config.data, whole_source(source))
            self._labellings[key] = found
        return self._labellings[key]


def _needs_labels(name: str) -> bool:
    free: Sequence[str] = [f"eval/{each}" for each in LABEL_FREE]
    return name.startswith(("eval/", "final/")) and name not in free


def _unmeasured(name: str, labelling: Labelling) -> str | None:
    """Return why a metric is not measured on the labelled images that there are, or None."""
    if not _needs_labels(name):
        return None
    if labelling.train is None or ("few_shot" in name and not labelling.few_shot):
        return "; ".join(labelling.notes) or "there are no labels"
    return None
