"""An empty MLflow store, which takes seconds to make, made once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def store(_empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A SQLite store for all tests of a module."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(_empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where MLflow puts artifacts
        yield f"sqlite:///{folder}/mlflow.db"
