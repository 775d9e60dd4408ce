"""The record of an MLflow run in a folder: what it holds, and what of it may be asked again."""

import json
from pathlib import Path

import pytest

from raysl.track.mlflow_record import (
    TrackedEvaluation,
    TrackedRun,
    read_tracked_evaluation,
    read_tracked_run,
    write_tracked_evaluation,
    write_tracked_run,
)


def test_a_run_comes_back_as_it_was_kept_under_the_keys_that_old_folders_have(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mlflow.json"
    tracked = TrackedRun("abc", "http://127.0.0.1:5000", "raysl", {"train/loss": 7})
    write_tracked_run(path, tracked)
    assert read_tracked_run(path) == tracked
    assert list(json.loads(path.read_text())) == ["run_id", "uri", "experiment", "sent"]


def test_an_evaluation_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.json"
    tracked = TrackedEvaluation("abc", "http://127.0.0.1:5000", "0123")
    write_tracked_evaluation(path, tracked)
    assert read_tracked_evaluation(path) == tracked
    assert list(json.loads(path.read_text())) == ["run_id", "uri", "what"]


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"run_id": null, "uri": "there"}'])
def test_a_file_that_names_no_run_is_none(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "mlflow.json"
    if text is not None:
        path.write_text(text)
    assert read_tracked_run(path) is None
    assert read_tracked_evaluation(path) is None


@pytest.mark.parametrize(
    ("uri", "whole"),
    [("http://server:5000", True), ("http://ann:***@server:5000", False), (None, False)],
)
def test_an_address_without_its_password_is_not_asked_again(uri: str | None, whole: bool) -> None:
    assert TrackedRun("abc", uri, None, None).whole_uri == (uri if whole else None)
