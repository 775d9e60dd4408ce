"""What a run says of MLflow, and what it sends at its end."""

from pathlib import Path
from typing import Any

import pytest

from raysl.run.tracking import end_tracker, print_problem, run_artifacts, start_tracker
from raysl.track import mlflow_tracker
from raysl.track.config import TrackConfig
from raysl.track.mlflow_problem import MlflowProblem
from raysl.track.run_folder import RunFolder

URI = "postgresql://u:secret@host/db"


class Tracker:
    """Stands for MLflow's tracker."""

    def __init__(self, folder: RunFolder | None = None, **given: Any) -> None:
        self.uri, self.run_id, self.problem = URI, "abc", None
        self.trouble: MlflowProblem | None = MlflowProblem("no answer", None)
        self.finished: dict[str, Any] = {}
        self.waited: list[float] = []

    def start(self) -> None:
        pass

    def wait_for_run(self, seconds: float) -> None:
        self.waited.append(seconds)

    def finish(self, **given: Any) -> None:
        self.finished = given


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("cure", [None, "give a database"])
def test_a_problem_says_whether_waiting_helps_and_never_a_password(
    capsys: pytest.CaptureFixture[str], ended: bool, cure: str | None
) -> None:
    print_problem(MlflowProblem("no answer", cure), URI, ended=ended)
    said = capsys.readouterr().err
    assert ("Work continues" in said) == (not ended)
    assert ("Nothing is lost: the same command sends the rest" in said) == ended
    assert ("What to do: give a database" in said) == (cure is not None)
    assert "secret" not in said


def test_no_problem_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_problem(None, URI, ended=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ended", [False, True])
def test_a_start_waits_for_the_first_answer_and_tells_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended: bool,
) -> None:
    monkeypatch.setattr(mlflow_tracker, "MlflowTracker", Tracker)
    tracker = start_tracker(
        RunFolder(tmp_path),
        TrackConfig(),
        uri=URI,
        run_name="r",
        params={},
        tags={},
        patience_s=3.0,
        **({"tell": None} if ended else {}),
    )
    assert tracker.waited == [3.0]  # type: ignore[attr-defined]
    assert ("accepts nothing" in capsys.readouterr().err) == (not ended)


def test_without_mlflow_the_results_say_so(tmp_path: Path) -> None:
    ended = end_tracker(None, RunFolder(tmp_path), TrackConfig(), artifacts=[])
    assert ended == {"mlflow_run_id": None}


@pytest.mark.parametrize("log_model", [False, True])
def test_the_end_sends_the_files_and_the_model_if_it_is_wanted(
    tmp_path: Path, log_model: bool
) -> None:
    folder = RunFolder(tmp_path)
    folder.pictures.mkdir()
    (folder.pictures / "map.png").touch()
    tracker: Any = Tracker()
    ended = end_tracker(
        tracker, folder, TrackConfig(log_model=log_model), artifacts=run_artifacts(folder)
    )
    assert ended == {"mlflow_run_id": "abc", "mlflow_problem": None}
    assert tracker.finished["status"] == "FINISHED"
    assert (tracker.finished["log_model"] is not None) == log_model
    names = {path.name for path in tracker.finished["artifacts"]}
    assert names >= {"config.yaml", "metrics.jsonl", "results.json", "report.html", "map.png"}
    assert not {"checkpoints", "features.npz"} & names
