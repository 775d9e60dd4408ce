"""What the driver tells MLflow of trials, and how long they had a place."""

from pathlib import Path
from typing import Any

import pytest

from raysl.config.yaml_text import to_yaml
from raysl.sweep.config import SweepConfig
from raysl.sweep.space import Candidate
from raysl.sweep.tracking import _params
from raysl.sweep.trial import SweepFolder, read_trial, write_trial
from raysl.sweep.watch import SweepWatch, placed_seconds

SETTINGS = {
    "name": "0000",
    "method": {"name": "simclr", "temperature": 0.1},
    "data": {"views": {"size_px": 32}},
}


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    found = SweepFolder(tmp_path / "s")
    run = found.trial(0)
    run.path.mkdir(parents=True)
    run.config.write_text(to_yaml(SETTINGS))
    params = {"method.temperature": 0.1, "data.views": "small", "config": "simclr"}
    write_trial(run, Candidate(0, params, {}, "base.yaml"))
    return found


def test_mlflow_gets_what_was_varied_once_and_no_names_of_trials(folder: SweepFolder) -> None:
    """Its compare page opens with the first parameters that differ."""
    sweep = SweepConfig(name="s", base=("base.yaml",))
    trial = read_trial(folder.trial(0), sweep.metric)
    assert trial is not None
    assert _params(trial) == {
        "method.name": "simclr",
        "method.temperature": 0.1,
        "data.views.size_px": 32,
        "sweep.data.views": "small",
        "sweep.config": "simclr",
    }


def test_a_pause_is_no_time_at_a_place(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((10.0, 13.0, 100.0, 104.0))
    monkeypatch.setattr("raysl.sweep.watch.time.time", lambda: next(clock))
    sweep = SweepConfig(name="s", base=("base.yaml",))
    trial: Any = read_trial(folder.trial(0), sweep.metric)
    watch = SweepWatch(sweep, folder, tracking=None, trials=[trial])
    for happens in (watch.started, watch.paused, watch.started, watch.paused):
        happens(0)
    monkeypatch.setattr("raysl.sweep.watch.time.time", lambda: 500.0)
    watch.ended(0, error=None)
    assert placed_seconds(trial) == pytest.approx(7.0)
