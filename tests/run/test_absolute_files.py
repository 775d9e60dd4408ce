from pathlib import Path
from typing import Any

import pytest

from raysl.errors import DataError
from raysl.run.places import with_absolute_files
from raysl.run.recipe import RunConfig, run_from_values


def config(weights: str | None) -> RunConfig[Any]:
    values = {
        "name": "a-run",
        "data": {"source": "digits", "views": {"recipe": "simclr", "size_px": 8}},
        "backbone": {"name": "resnet18", "weights": weights},
        "method": {"name": "simclr"},
        "train": {"epochs": 1, "global_batch_size": 4},
    }
    return run_from_values(values, where="test")


def test_a_relative_path_is_looked_for_here_and_then_where_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (here, home):
        folder.mkdir()
    monkeypatch.chdir(here)
    (home / "w.pth").touch()
    assert with_absolute_files(config("w.pth"), home).backbone.weights == str(home / "w.pth")
    (here / "w.pth").touch()
    assert with_absolute_files(config("w.pth"), home).backbone.weights == str(here / "w.pth")


def test_an_absolute_path_and_none_stay_as_they_are(tmp_path: Path) -> None:
    path = str(tmp_path)
    assert with_absolute_files(config(path), Path("/")).backbone.weights == path
    assert with_absolute_files(config(None), Path("/")) == config(None)


def test_what_is_nowhere_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"backbone.weights=no.pth: no such file or folder"):
        with_absolute_files(config("no.pth"), tmp_path)
