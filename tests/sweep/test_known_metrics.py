"""The metrics that a sweep may name are those that a run writes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.run.local import pretrain_here
from raysl.run.recipe import load_run
from raysl.sources.open import open_source
from raysl.sweep.problems import METRICS
from raysl.track.results import TRAINING
from raysl.track.run_folder import RunFolder, read_metrics

# Only with an adversary, with a classifier, or where protocols train the network after the run.
ELSEWHERE = {"train/adversary_loss", "eval/top1", "final/top1"} | {
    f"final/{name}_top1{std}" for name in TRAINING for std in ("", "_std")
}
SHORT = [
    "evaluate.final=[knn,linear,linear_lbfgs,few_shot]",
    "evaluate.few_shot.draws=2",
    "evaluate.linear={epochs: 1, base_lrs: [0.1]}",
    "evaluate.pixel_baseline=false",
    "train.steps=3",
]


@pytest.mark.slow
def test_a_run_writes_all_that_are_known(run_yaml: Callable[[str], Path], tmp_path: Path) -> None:
    config = load_run(run_yaml("a"), SHORT)
    folder = RunFolder(tmp_path / "a")
    folder.path.mkdir()
    source = open_source(config.data, data=config.data)
    pretrain_here(config, folder=folder, source=source, num_cpus=1)
    written = {key for record in read_metrics(folder.metrics) for key in record}
    assert set(METRICS) - written == ELSEWHERE
    measured = {key for key in written if key.startswith(("eval/", "train/", "final/"))}
    assert measured - set(METRICS) <= {"train/lr", "train/epoch"}
