"""The results of a run keep their keys and their order, and old folders open."""

import json
from pathlib import Path

from raysl.track.results import Probed, Results, Scores, accuracies_of, scores_of, with_prefix
from raysl.track.run_folder import RunFolder

PROBED: Probed = {
    "knn_top1": 0.9,
    "linear_top1": 0.95,
    "few_shot_top1": 0.7,
    "few_shot_top1_std": 0.03,
}


def test_accuracies_of_each_kind_of_features_have_keys_of_their_own() -> None:
    results: Results = with_prefix("", PROBED) | with_prefix("pixels_", {"knn_top1": 0.4})
    assert list(results) == [*PROBED, "pixels_knn_top1"]
    assert scores_of(results, "") == Scores(0.9, 0.95, 0.7, 0.03)
    assert scores_of(results, "pixels_") == Scores(0.4, None, None, None)
    assert scores_of(results, "untrained_") == Scores(None, None, None, None)


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
    folder.results.write_text('{"linear_top1": 0.5, "of_another_version": [1, 2]}')
    results = folder.read_results()
    assert results is not None
    assert scores_of(results, "").linear_top1 == 0.5
