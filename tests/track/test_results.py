"""The results of a run keep their keys and their order, and old folders open."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from raysl.track.results import Results, accuracies_of, measured_probes, score_of, with_prefix
from raysl.track.run_folder import RunFolder

PROBED = {"knn_top1": 0.9, "linear_lbfgs_top1": 0.95}
PROBED |= {"few_shot_top1": 0.7, "few_shot_top1_std": 0.03}


def test_accuracies_of_each_kind_of_features_have_keys_of_their_own() -> None:
    results: Results = with_prefix("", PROBED) | with_prefix("pixels_", {"linear_top1": 0.4})
    assert list(results) == [*PROBED, "pixels_linear_top1"]
    assert score_of(results, "few_shot") == (0.7, 0.03)
    assert score_of(results, "linear", "pixels_") == (0.4, None)
    assert score_of(results, "knn", "untrained_") is None
    assert measured_probes(results) == ["knn", "linear", "linear_lbfgs", "few_shot"]


@pytest.mark.parametrize("value", [math.nan, None, "0.5"])
def test_what_is_no_number_was_not_measured(value: Any) -> None:
    assert measured_probes(with_prefix("", {"knn_top1": value})) == []


def test_what_was_measured_of_the_network_is_told_apart_from_counts() -> None:
    results: Results = {"top1": 0.5, "finetune_top1": 0.6, "steps": 10, "few_shot_labels": 5}
    assert accuracies_of(results) == {"top1": 0.5, "finetune_top1": 0.6}


def test_a_folder_gives_back_what_was_written_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_results() is None
    results: Results = {"run_dir": str(tmp_path), "steps": 10, "knn_top1": 0.25, "seconds": 1.5}
    folder.write_results(results)
    assert list(json.loads(folder.results.read_text())) == list(results)
    assert folder.read_results() == results


def test_keys_of_other_versions_are_no_hindrance(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.results.write_text('{"knn_top1": 0.5, "of_another_version": [1, 2]}')
    results = folder.read_results()
    assert results is not None
    assert score_of(results, "knn") == (0.5, None)


def test_linear_was_logistic_regression_until_results_named_their_protocols(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.results.write_text('{"linear_top1": 0.5, "untrained_linear_top1": 0.3}')
    assert folder.read_results() == {"linear_lbfgs_top1": 0.5, "untrained_linear_lbfgs_top1": 0.3}
    now: Results = {"protocols": {"linear": "linear@1 (SGD)"}}
    folder.write_results(with_prefix("", {"linear_top1": 0.5}) | now)
    results = folder.read_results()
    assert results is not None
    assert score_of(results, "linear") == (0.5, None)
    assert score_of(results, "linear_lbfgs") is None
