"""What a run says at its start of the labels that it is measured with."""

from typing import Any

import numpy as np
import pytest

from raysl.evaluate.training_source import seen_part
from raysl.run.labelled_sets import labelling_of, open_sets
from raysl.run.recipe import RunConfig, run_from_values
from raysl.sources.source import ArraySource, Source

LABELS = np.array([0] * 30 + [1] * 3)


def source(labels: Any = LABELS) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 8, 8, 3), dtype=np.uint8)
    return ArraySource("photos", pixels, labels, ["cat", "dog"])


def run(method: str = "simclr", **evaluate: Any) -> RunConfig[Any]:
    values: dict[str, Any] = {
        "name": "a",
        "data": {"source": "photos", "views": {"recipe": "simclr", "size_px": 32}},
        "method": {"name": method},
        "train": {"epochs": 1, "global_batch_size": 4},
        "evaluate": evaluate,
    }
    if method == "supervised":
        values["data"]["views"] = {"recipe": "finetune", "size_px": 32}
    return run_from_values(values, where="a test")


def seen(config: RunConfig[Any]) -> Source:
    return seen_part(source(), config.data, config.evaluate, config.method)


def test_a_probe_that_is_left_out_is_told() -> None:
    (note,) = labelling_of(run(), source()).notes
    assert "('dog' has 3)" in note or "('dog' has 2)" in note
    sets = open_sets(run(), source(), num_threads=1)
    assert sets is not None
    assert not sets.few_shot


@pytest.mark.parametrize(
    "config",
    [run(final=["knn"]), run("supervised"), run(few_shot={"labels_per_class": 1})],
    ids=str,
)
def test_a_probe_that_nobody_trains_is_not_told(config: RunConfig[Any]) -> None:
    assert labelling_of(config, seen(config)).notes == ()


def test_a_run_without_labels_says_that_nothing_is_measured() -> None:
    (note,) = labelling_of(run(), source(None)).notes
    assert (
        note
        == "photos has no labels, so that no accuracy is measured; use a source that has labels"
    )
