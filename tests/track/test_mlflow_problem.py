"""What MLflow will not take, as its client says it, told apart."""

import shlex
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from raysl.track.mlflow_evaluation import EvaluationRecord, send_evaluation
from raysl.track.mlflow_problem import MlflowProblem
from raysl.track.mlflow_tracker import MlflowTracker
from raysl.track.run_folder import MetricsFile, RunFolder


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setattr("raysl.track.mlflow_tracker._EVERY_S", 0.01)
    monkeypatch.setattr("raysl.track.mlflow_tracker._RETRY_S", (0.01,) * 5)


@contextmanager
def server(status: int, body: str) -> Iterator[str]:
    """Answer all that is asked with one status; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_address[1]}"
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def tracker_of(folder: Path, uri: str) -> MlflowTracker:
    return MlflowTracker(
        RunFolder(folder), uri=uri, experiment="mine", run_name="r", params={}, tags={}
    )


def first_trouble(folder: Path, uri: str) -> MlflowProblem:
    """Return what is known at the start of a run."""
    tracker = tracker_of(folder, uri)
    tracker.start()
    assert tracker.wait_for_run() is None
    trouble = tracker.trouble
    tracker.finish(status="FINISHED", artifacts=[], log_model=None)
    assert trouble is not None
    assert tracker.problem == trouble.text  # it stays
    return trouble


@pytest.mark.parametrize(
    ("status", "body", "cure"),
    [
        (401, "You are not authenticated.", "set MLFLOW_TRACKING_USERNAME and"),
        (403, "Permission denied", "may not write to the experiment: ask its owner to allow it"),
        (404, "<html>nothing here", "not an MLflow tracking server: check host, port and path"),
        (200, "<html>a page", "not an MLflow tracking server: check host, port and path"),
    ],
)
def test_what_a_server_will_not_take_by_waiting(
    tmp_path: Path, status: int, body: str, cure: str
) -> None:
    with server(status, body) as uri:
        assert cure in str(first_trouble(tmp_path, uri).cure)


def test_a_server_that_is_down_or_in_trouble_needs_no_cure(tmp_path: Path) -> None:
    with server(503, "later") as uri:
        assert first_trouble(tmp_path / "a", uri).cure is None
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{held.getsockname()[1]}"
        assert first_trouble(tmp_path / "b", closed).cure is None


def test_a_server_that_says_nothing_holds_the_start_so_long_and_no_longer(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracker = tracker_of(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker.start()
        assert tracker.wait_for_run(0.05) is None
        assert tracker.trouble == ("the tracking server does not answer within 0.05 s", None)


@pytest.mark.parametrize(
    ("uri", "cure"),
    [
        ("mlruns", "MLFLOW_ALLOW_FILE_STORE=true"),
        ("file:///tmp/mlruns", "give a database, such as track.tracking_uri=sqlite:///mlflow.db"),
        (
            "bogus://x",
            "set track.tracking_uri to an address that MLflow supports: http://HOST:PORT",
        ),
        ("postgresql+nodriver://u:secret@h/db", None),
    ],
)
def test_addresses_that_mlflow_does_not_take(tmp_path: Path, uri: str, cure: str | None) -> None:
    text, found = first_trouble(tmp_path, uri)
    assert "secret" not in text
    assert found is None if cure is None else cure in str(found)


def test_a_driver_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    _, cure = first_trouble(tmp_path, "mysql+pymysql://u:secret@127.0.0.1:1/db")
    assert cure == "install pymysql, which MLflow needs for mysql+pymysql"


def test_a_file_that_is_no_database_and_one_of_an_old_version(tmp_path: Path, store: str) -> None:
    (tmp_path / "text.db").write_text("no database" * 100)
    _, cure = first_trouble(tmp_path / "a", f"sqlite:///{tmp_path}/text.db")
    assert cure == "give another file: track.tracking_uri=sqlite:///FILE"
    old = tmp_path / "old.db"
    with sqlite3.connect(store.removeprefix("sqlite:///")) as new, sqlite3.connect(old) as copy:
        new.backup(copy)
        copy.execute("update alembic_version set version_num = '451aebb31d03'")
    _, cure = first_trouble(tmp_path / "b", f"sqlite:///{old}")
    assert f"mlflow db upgrade sqlite:///{old}" in str(cure)


def test_the_cure_of_a_deleted_experiment_is_a_command_that_works(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(store)
    client.delete_experiment(client.create_experiment("mine"))
    tracker = tracker_of(tmp_path, store)
    tracker.start()
    assert tracker.wait_for_run() is None
    assert tracker.trouble is not None
    assert "the experiment 'mine' was deleted" in tracker.trouble.text
    line = str(tracker.trouble.cure).splitlines()[-1].strip()
    variable, program, *words = shlex.split(line)
    monkeypatch.setenv(*variable.split("=", 1))
    assert program == "mlflow"
    subprocess.run([sys.executable, "-m", program, *words], check=True, timeout=240)
    MetricsFile(RunFolder(tmp_path).metrics, start_step=0).log({"loss": 1.0}, step=1)
    tracker.finish(status="FINISHED", artifacts=[], log_model=None)
    assert tracker.problem is None
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).data.metrics == {"loss": 1.0}


def test_a_run_deleted_while_it_is_written_to_is_told_anew(tmp_path: Path, store: str) -> None:
    tracker = tracker_of(tmp_path, store)
    tracker.experiment = "written"
    tracker.start()
    first = tracker.wait_for_run()
    assert first is not None
    MlflowClient(store).delete_run(first)
    MetricsFile(RunFolder(tmp_path).metrics, start_step=0).log({"loss": 2.0}, step=1)
    tracker._stop.set()  # its thread must not send at the same time as this one
    tracker._thread.join()
    for _ in range(2):  # the first attempt meets the deleted run
        tracker._send_pending()
    tracker.finish(status="FINISHED", artifacts=[], log_model=None)
    assert tracker.problem is None
    assert tracker.run_id != first
    assert MlflowClient(store).get_run(str(tracker.run_id)).data.metrics == {"loss": 2.0}


def test_an_evaluation_meets_a_deleted_experiment_in_the_same_way(
    tmp_path: Path, store: str
) -> None:
    from raysl.track.mlflow_problem import DeletedExperimentError

    client = MlflowClient(store)
    client.delete_experiment(client.create_experiment("measured"))
    record = EvaluationRecord({}, {}, [], tmp_path, "evaluations/x")
    with pytest.raises(DeletedExperimentError, match="'measured' was deleted"):
        send_evaluation(
            record, uri=store, run_id=None, experiment="measured", run_name="r", key="k"
        )
