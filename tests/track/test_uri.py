from pathlib import Path

import pytest

from raysl.track.uri import compare_line, is_file_store, same_store, tracking_uri


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("sqlite:///mlflow.db", "mlflow ui --backend-store-uri sqlite:////here/mlflow.db"),
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


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("sqlite:///m.db", "sqlite:////here/m.db"),
        ("sqlite:///a/m.db?timeout=30", "sqlite:////here/a/m.db?timeout=30"),
        ("sqlite+pysqlite:///m.db", "sqlite+pysqlite:////here/m.db"),
        ("sqlite:////there/m.db", "sqlite:////there/m.db"),
        ("sqlite:///C:/m.db", "sqlite:///C:/m.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
@pytest.mark.parametrize("configured", [True, False])
def test_a_relative_sqlite_file_lies_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, uri: str, absolute: str, configured: bool
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other" if configured else uri)
    assert tracking_uri(uri if configured else None, folder=Path("/here")) == absolute


def test_a_run_folder_of_an_earlier_version_is_known_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert same_store("sqlite:///m.db", f"sqlite:///{tmp_path}/m.db")
    assert same_store("postgresql://me:***@host/db", "postgresql://me:secret@host/db")
    assert not same_store("sqlite:///m.db", "sqlite:////there/m.db")
    assert not same_store(None, "sqlite:////there/m.db")
