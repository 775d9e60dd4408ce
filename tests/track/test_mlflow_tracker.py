import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities import Metric, Run
from mlflow.tracking import MlflowClient

from raysl.folder.whole import read_json
from raysl.track.mlflow_model import log_encoder
from raysl.track.mlflow_record import run_key
from raysl.track.mlflow_tracker import MlflowTracker
from raysl.track.run_folder import MetricsFile, RunFolder, read_metrics

PARAMS: dict[str, Any] = {"optim.base_lr": 0.1, "method.name": "simclr", "data.limit": None}
TAGS = {"host": "here"}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setattr("raysl.track.mlflow_tracker._EVERY_S", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record what goes to the store, which would itself drop an exact repetition."""
    points: list[tuple[str, int]] = []
    log_batch = MlflowClient.log_batch

    def spy(
        self: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), **others: Any
    ) -> object:
        points.extend((metric.key, metric.step) for metric in metrics)
        return log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    return points


def tracker_of(
    folder: RunFolder, uri: str, params: Mapping[str, Any] | None = None
) -> MlflowTracker:
    return MlflowTracker(
        folder,
        uri=uri,
        experiment=folder.path.parent.name,  # each test has its own
        run_name="a run",
        params=PARAMS if params is None else params,
        tags=TAGS,
    )


def train(folder: RunFolder, *, first: int, last: int) -> None:
    """Log steps, as a run that starts or resumes after ``first - 1`` does."""
    file = MetricsFile(folder.metrics, start_step=first - 1)
    for step in range(first, last + 1):
        file.log({"loss": 1 / step}, step=step)
    file.close()


def finish(tracker: MlflowTracker, status: str = "FINISHED") -> None:
    tracker.finish(status=status, artifacts=[], log_model=None)


def runs_of(folder: RunFolder, uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(folder.path.parent.name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def losses_of(run: Run, uri: str) -> list[tuple[int, float]]:
    history = MlflowClient(uri).get_metric_history(run.info.run_id, "loss")
    return sorted((metric.step, metric.value) for metric in history)


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_sends_metrics_by_step_and_params_and_tags_to_one_run(
    folder: RunFolder, store: str
) -> None:
    tracker = tracker_of(folder, store)
    tracker.start()
    train(folder, first=1, last=5)
    finish(tracker)
    assert tracker.problem is None
    (run,) = runs_of(folder, store)
    assert run.info.run_id == tracker.run_id
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert losses_of(run, store) == [(step, 1 / step) for step in range(1, 6)]
    times = MlflowClient(store).get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.timestamp for metric in times) == [
        int(record["time"] * 1000) for record in read_metrics(folder.metrics)
    ]
    assert run.data.params == {
        "optim.base_lr": "0.1",
        "method.name": "simclr",
        "data.limit": "None",
    }
    assert run.data.tags["host"] == "here"


def test_sends_while_the_run_goes_on(
    folder: RunFolder, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = threading.Event()
    log_batch = MlflowClient.log_batch

    def spy(self: MlflowClient, *args: Any, **others: Any) -> None:
        log_batch(self, *args, **others)
        if others.get("metrics"):
            arrived.set()

    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    tracker = tracker_of(folder, store)
    tracker.start()
    train(folder, first=1, last=1)
    assert arrived.wait(60)
    (run,) = runs_of(folder, store)
    assert run.info.status == "RUNNING"
    assert losses_of(run, store) == [(1, 1.0)]
    finish(tracker, "KILLED")
    (run,) = runs_of(folder, store)
    assert run.info.status == "KILLED"


def test_sends_more_metrics_and_params_than_one_call_takes(
    folder: RunFolder, store: str, sent: list[tuple[str, int]]
) -> None:
    params = {f"p{i}": i for i in range(250)} | {"long": "x" * 7000}
    tracker = tracker_of(folder, store, params)
    train(folder, first=1, last=2100)
    tracker.start()
    finish(tracker)
    assert tracker.problem is None
    (run,) = runs_of(folder, store)
    assert len(run.data.params) == 251
    assert sent == [("loss", step) for step in range(1, 2101)]
    assert [step for step, _ in losses_of(run, store)] == list(range(1, 2101))


def test_what_is_not_finite_is_a_tag_and_no_metric(folder: RunFolder, store: str) -> None:
    file = MetricsFile(folder.metrics, start_step=0)
    file.log({"loss": float("nan"), "norm": 1.0}, step=1)
    file.log({"loss": 2.0, "norm": float("inf")}, step=2)
    file.log({"loss": float("-inf"), "time/x": float("inf")}, step=3)
    file.close()
    tracker = tracker_of(folder, store)
    tracker.start()
    finish(tracker)
    assert tracker.problem is None
    (run,) = runs_of(folder, store)
    assert losses_of(run, store) == [(2, 2.0)]
    assert run.data.metrics == {"loss": 2.0, "norm": 1.0}
    tags = {k: v for k, v in run.data.tags.items() if k.startswith("not_finite.")}
    assert tags == {"not_finite.loss": "-inf at step 3", "not_finite.norm": "inf at step 2"}


def test_a_resumed_run_goes_on_with_its_mlflow_run_and_sends_nothing_twice(
    folder: RunFolder, store: str, sent: list[tuple[str, int]]
) -> None:
    first = tracker_of(folder, store)
    first.start()
    train(folder, first=1, last=5)
    finish(first, "FAILED")
    # The checkpoint was of step 3: steps 4 and 5 are repeated, with other times.
    second = tracker_of(folder, store, {**PARAMS, "optim.base_lr": 0.2, "new": 1})
    second.start()
    train(folder, first=4, last=8)
    finish(second)
    assert second.problem is None
    assert second.run_id == first.run_id
    (run,) = runs_of(folder, store)
    assert run.info.status == "FINISHED"
    assert sent == [("loss", step) for step in range(1, 9)]
    assert losses_of(run, store) == [(step, 1 / step) for step in range(1, 9)]
    assert run.data.params["new"] == "1"
    assert run.data.params["optim.base_lr"] == "0.1"  # MLflow's params never change


def test_a_server_that_is_down_loses_nothing(folder: RunFolder, store: str) -> None:
    called: list[object] = []
    down = tracker_of(folder, f"http://127.0.0.1:{closed_port()}")
    down.start()
    train(folder, first=1, last=3)
    down.finish(status="FINISHED", artifacts=[folder.metrics], log_model=called.append)
    assert down.problem is not None
    assert down.run_id is None
    assert called == []
    assert [record["step"] for record in read_metrics(folder.metrics)] == [1, 2, 3]
    later = tracker_of(folder, store)
    later.start()
    finish(later)
    assert later.problem is None
    (run,) = runs_of(folder, store)
    assert losses_of(run, store) == [(step, 1 / step) for step in (1, 2, 3)]


def test_what_a_failing_server_did_not_take_is_sent_by_the_next_start(
    folder: RunFolder, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tracker_of(folder, store)
    train(folder, first=1, last=2)
    first.start()
    finish(first)

    def refuse(self: MlflowClient, *_: object, **__: object) -> None:
        raise ConnectionError("gone\nwith a long story")

    train(folder, first=3, last=4)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        failing = tracker_of(folder, store)
        failing.start()
        finish(failing)
    assert failing.problem == "ConnectionError: gone"
    kept = read_json(folder.mlflow)
    assert kept is not None
    assert (kept["run_id"], kept["sent"]) == (first.run_id, {"loss": 2})
    last = tracker_of(folder, store)
    last.start()
    finish(last)
    assert last.problem is None
    (run,) = runs_of(folder, store)
    assert losses_of(run, store) == [(step, 1 / step) for step in (1, 2, 3, 4)]


def test_a_server_that_never_answers_does_not_hold_the_end_of_a_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysl.track.mlflow_tracker._LAST_CHANCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        tracker = tracker_of(folder, f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker.start()
        connection, _ = server.accept()
        with connection:
            finish(tracker)
            # Before the connection ends, which would be an answer of a kind.
            assert tracker.problem == "the tracking server does not answer"


def test_a_run_deleted_on_the_server_is_told_anew(folder: RunFolder, store: str) -> None:
    first = tracker_of(folder, store)
    first.start()
    train(folder, first=1, last=3)
    finish(first)
    assert first.run_id is not None
    MlflowClient(store).delete_run(first.run_id)
    train(folder, first=4, last=5)
    second = tracker_of(folder, store)
    second.start()
    finish(second)
    assert second.problem is None
    (run,) = runs_of(folder, store)
    assert run.info.run_id == second.run_id != first.run_id
    assert losses_of(run, store) == [(step, 1 / step) for step in range(1, 6)]
    assert run.data.params["method.name"] == "simclr"


def test_a_run_that_the_server_never_knew_is_told_anew(folder: RunFolder, store: str) -> None:
    first = tracker_of(folder, store)
    first.start()
    train(folder, first=1, last=3)
    finish(first)
    assert first.run_id is not None
    text = folder.mlflow.read_text()
    text = text.replace(run_key(folder.mlflow), "of another server")
    folder.mlflow.write_text(text.replace(first.run_id, "0" * 32))
    second = tracker_of(folder, store)
    second.start()
    finish(second)
    assert second.problem is None
    (run,) = [run for run in runs_of(folder, store) if run.info.run_id != first.run_id]
    assert losses_of(run, store) == [(step, 1 / step) for step in (1, 2, 3)]


def test_stores_artifacts_where_they_lie_in_the_run_folder(folder: RunFolder, store: str) -> None:
    tracker = tracker_of(folder, store)
    train(folder, first=1, last=1)
    folder.pictures.mkdir()
    (folder.pictures / "views.png").write_bytes(b"png")
    logged: list[MlflowTracker] = []
    tracker.start()
    tracker.finish(
        status="FINISHED",
        artifacts=[folder.metrics, folder.pictures / "views.png", folder.report],
        log_model=logged.append,
    )
    assert tracker.problem is None
    assert logged == [tracker]
    assert tracker.run_id is not None
    client = MlflowClient(store)
    assert [item.path for item in client.list_artifacts(tracker.run_id)] == [
        "metrics.jsonl",
        "pictures",
    ]
    (picture,) = client.list_artifacts(tracker.run_id, "pictures")
    assert picture.path == "pictures/views.png"


@pytest.mark.parametrize("end", ["", "/"])
def test_neither_the_problem_nor_the_kept_file_shows_a_password(
    folder: RunFolder, end: str
) -> None:
    tracker = tracker_of(folder, f"http://ann:secret@127.0.0.1:{closed_port()}{end}")
    train(folder, first=1, last=1)
    tracker.start()
    finish(tracker)
    assert tracker.problem is not None
    assert "secret" not in tracker.problem
    tracker._write_record()
    assert "ann:***@127.0.0.1" in folder.mlflow.read_text()
    assert "secret" not in folder.mlflow.read_text()


def test_a_registered_encoder_is_the_newest_version_of_its_name(
    folder: RunFolder, store: str
) -> None:
    train(folder, first=1, last=1)
    tracker = tracker_of(folder, store)
    tracker.start()
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5)).eval()
    tracker.finish(
        status="FINISHED",
        artifacts=[],
        log_model=lambda of: (
            log_encoder(
                encoder,
                uri=of.uri,
                run_id=of.run_id,
                size_px=4,
                embed_dim=5,
                packages=["torch"],
                registered_as="photos",
            )
            and None
        ),
    )
    assert tracker.problem is None
    (version,) = MlflowClient(store).search_model_versions("name='photos'")
    assert version.run_id == tracker.run_id


def test_tags_that_are_known_at_the_end_are_sent_then(folder: RunFolder, store: str) -> None:
    train(folder, first=1, last=1)
    tracker = tracker_of(folder, store)
    tracker.start()
    assert tracker.wait_for_run() is not None
    tracker.finish(status="FINISHED", artifacts=[], log_model=None, tags={"status": "stopped"})
    run = MlflowClient(store).get_run(str(tracker.run_id))
    assert run.data.tags["status"] == "stopped"
    assert run.data.tags["host"] == "here"
