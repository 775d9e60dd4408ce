"""Each piece of work has one MLflow run, whatever of the server's answers is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from raysl.folder.claim import set_aside
from raysl.folder.whole import read_json
from raysl.track.mlflow_evaluation import EvaluationRecord, send_evaluation
from raysl.track.mlflow_model import register_encoder
from raysl.track.mlflow_record import TrackedRun, run_key, write_tracked_run
from raysl.track.mlflow_runs import KEY
from raysl.track.mlflow_tracker import MlflowTracker
from raysl.track.run_folder import MetricsFile, RunFolder

Create = Callable[..., Run]
create_run = MlflowClient.create_run


def losing_first(made: list[Run]) -> Create:
    """Return a server whose first answer is lost after it has made the run."""

    def create(client: MlflowClient, *args: Any, **values: Any) -> Run:
        made.append(create_run(client, *args, **values))
        if len(made) == 1:
            raise ConnectionError("closed before the answer")
        return made[-1]

    return create


def repeating(client: MlflowClient, *args: Any, **values: Any) -> Run:
    """MLflow's client repeats a request by itself when the answer to the first one is lost."""
    create_run(client, *args, **values)
    return create_run(client, *args, **values)


@pytest.fixture(params=["lost", "repeated by the client"])
def _answer_is_lost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    create = losing_first([]) if request.param == "lost" else repeating
    monkeypatch.setattr(MlflowClient, "create_run", create)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def tracker_of(folder: RunFolder, uri: str) -> MlflowTracker:
    return MlflowTracker(
        folder,
        uri=uri,
        experiment=folder.path.parent.name,  # each test has its own
        run_name="a run",
        params={"seed": 1},
        tags={"host": "here"},
    )


def run_through(folder: RunFolder, uri: str) -> MlflowTracker:
    """Log three steps and end, as one start of a run does."""
    tracker = tracker_of(folder, uri)
    tracker.start()
    tracker.wait_for_run(60)
    if not folder.metrics.exists():
        file = MetricsFile(folder.metrics, start_step=0)
        for step in (1, 2, 3):
            file.log({"loss": 1 / step}, step=step)
        file.close()
    tracker.finish(status="FINISHED", artifacts=[], log_model=None)
    return tracker


def runs_in(name: str, uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def only_run(folder: RunFolder, uri: str) -> Run:
    (run,) = runs_in(folder.path.parent.name, uri)
    assert run.info.status == "FINISHED"
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == [1, 2, 3]
    assert run.data.params == {"seed": "1"}
    assert run.data.tags["host"] == "here"
    return run


@pytest.mark.usefixtures("_answer_is_lost")
def test_one_run_where_the_answer_to_its_creation_is_lost(folder: RunFolder, store: str) -> None:
    tracker = run_through(folder, store)
    assert tracker.problem is None
    assert only_run(folder, store).info.run_id == tracker.run_id


def test_a_run_that_no_answer_told_of_is_taken_over_by_the_next_start(
    folder: RunFolder, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Run] = []
    monkeypatch.setattr(MlflowClient, "create_run", losing_first(made))
    with monkeypatch.context() as patch:
        patch.setattr("raysl.track.mlflow_runs._runs_with", _gone_after(0))
        assert run_through(folder, store).run_id is None
        assert made == []  # it asks before it creates
        patch.setattr("raysl.track.mlflow_runs._runs_with", _gone_after(1))
        assert run_through(folder, store).run_id is None
        assert len(made) == 1
    found = run_through(folder, store)
    assert found.problem is None
    assert only_run(folder, store).info.run_id == made[0].info.run_id


def _gone_after(answers: int) -> Callable[..., list[Run]]:
    """Return a search for which the server is there so many times, and finds nothing."""
    asked = iter(range(answers))

    def search(*_: Any) -> list[Run]:
        if next(asked, None) is None:
            raise ConnectionError("closed before the answer")
        return []

    return search


def test_a_run_that_the_server_makes_after_another_was_created_is_deleted_at_the_end(
    folder: RunFolder, store: str
) -> None:
    tracker = tracker_of(folder, store)
    tracker.start()
    assert tracker.wait_for_run(60) is not None
    client = MlflowClient(store)
    late = create_run(client, tracker._experiment_id, tags={KEY: run_key(folder.mlflow)})
    measured = create_run(client, tracker._experiment_id, tags={KEY: run_key(folder.mlflow)})
    client.log_metric(measured.info.run_id, "loss", 1.0)  # no lost answer: it is left alone
    other = create_run(client, tracker._experiment_id, tags={KEY: "of another folder"})
    tracker.finish(status="FINISHED", artifacts=[], log_model=None)
    assert tracker.problem is None
    left = {run.info.run_id for run in runs_in(folder.path.parent.name, store)}
    assert left == {tracker.run_id, measured.info.run_id, other.info.run_id}
    assert late.info.run_id not in left


def test_where_only_the_owner_may_delete_a_double_is_ended(
    folder: RunFolder, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    def refuse(*_: Any) -> None:
        raise MlflowException("permission denied")

    monkeypatch.setattr(MlflowClient, "create_run", repeating)
    monkeypatch.setattr(MlflowClient, "delete_run", refuse)
    run_through(folder, store)
    statuses = [run.info.status for run in runs_in(folder.path.parent.name, store)]
    assert sorted(statuses) == ["FINISHED", "KILLED"]


def test_the_key_is_the_folders_own_and_a_fresh_start_has_another(
    folder: RunFolder, store: str
) -> None:
    first = run_through(folder, store)
    key = run_key(folder.mlflow)
    assert only_run(folder, store).data.tags[KEY] == key
    assert run_through(folder, store).run_id == first.run_id
    assert run_key(folder.mlflow) == key
    set_aside(folder)  # as --fresh does
    assert run_through(folder, store).run_id != first.run_id
    assert run_key(folder.mlflow) != key


def test_the_key_is_on_the_disk_before_the_run_is_created(tmp_path: Path) -> None:
    path = tmp_path / "run" / "mlflow.json"
    key = run_key(path)
    assert read_json(path) == {"key": key}
    write_tracked_run(path, TrackedRun("abc", "sqlite:///here", "raysl", {}))
    assert run_key(path) == key


def test_a_store_that_the_folder_comes_back_to_has_its_run_still(
    folder: RunFolder, store: str, tmp_path: Path
) -> None:
    first = run_through(folder, store)
    write_tracked_run(folder.mlflow, TrackedRun("0" * 32, "http://elsewhere:5000", "other", {}))
    again = run_through(folder, store)
    assert again.run_id == first.run_id
    only_run(folder, store)


@pytest.mark.usefixtures("_answer_is_lost")
def test_an_evaluation_of_an_encoder_without_a_run_has_one(tmp_path: Path, store: str) -> None:
    record = EvaluationRecord({"knn": 0.5}, {}, [], tmp_path, "evaluations/x")
    ids = {
        send_evaluation(
            record,
            uri=store,
            run_id=None,
            experiment=tmp_path.name,
            run_name="r",
            key=run_key(tmp_path / "mlflow.json"),
        )
        for _ in range(2)
    }
    (run,) = runs_in(tmp_path.name, store)
    assert ids == {run.info.run_id}
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"knn": 0.5})


@pytest.mark.usefixtures("_answer_is_lost")
def test_an_export_has_one(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.pytorch.log_model", _ModelUri)
    monkeypatch.setattr("mlflow.pytorch.load_model", lambda *_, **__: None)
    monkeypatch.setattr("mlflow.register_model", lambda *_: _Version)
    register_encoder(
        torch.nn.Flatten(),
        uri=store,
        name="photos",
        run_id=None,
        experiment=tmp_path.name,
        size_px=4,
        embed_dim=48,
        packages=[],
        check=lambda _: 0.0,
    )
    (run,) = runs_in(tmp_path.name, store)
    assert run.info.status == "FINISHED"


class _ModelUri:
    model_uri = "models:/m-0"

    def __init__(self, *_: Any, **__: Any) -> None: ...


class _Version:
    version = 1
