from pathlib import Path

import pytest

from raysl.track.uri import compare_line, is_file_store, tracking_uri


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("sqlite:///mlflow.db", "mlflow ui --backend-store-uri sqlite:///mlflow.db"),
        ("sqlite:////my db/m.db", "mlflow ui --backend-store-uri 'sqlite:////my db/m.db'"),
        ("https://me:secret@host:5000/x", "https://host:5000/x"),  # opened in a browser
        ("mlruns", "mlflow ui --backend-store-uri mlruns"),
    ],
)
def test_runs_are_compared_by_a_command_or_at_an_address(uri: str, line: str) -> None:
    assert compare_line(uri, folder=Path("/here")) == line


def test_a_password_in_the_environment_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    line = compare_line(None, folder=Path("/here"))
    assert line == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'


def test_without_any_address_it_is_a_file_in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None, folder=Path("/here")) == "sqlite:////here/mlflow.db"


def test_folders_of_files_are_told_from_databases() -> None:
    assert all(is_file_store(uri) for uri in ("mlruns", "./a/b", "/a/b", "file:///a/b"))
    others = ("sqlite:///m.db", "http://h", "databricks", "databricks://me", "postgresql://h/d")
    assert not any(is_file_store(uri) for uri in others)
