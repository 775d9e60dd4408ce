"""The trials of a sweep train on one set of images, from its first start to its end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import read_mapping
from raysl.config.yaml_text import to_yaml
from raysl.errors import RunFolderError
from raysl.run.recipe import RunConfig, run_from_values
from raysl.run.source_record import record_source
from raysl.sweep.sources import Sources
from raysl.track.run_folder import RunFolder, checkpoint_path


def trial(home: Path, number: int, *, source: str = "p") -> tuple[RunFolder, RunConfig[Any]]:
    folder = RunFolder(home / "runs" / f"{number:04d}")
    values = {
        "name": f"{number:04d}",
        "data": {"source": source},
        "method": {"name": "simclr"},
        "train": {"epochs": 2, "global_batch_size": 4},
    }
    config = run_from_values(values, where="test")
    folder.path.mkdir(parents=True)
    folder.config.write_text(to_yaml(config.model_dump(mode="json")))
    return folder, config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw_images: Callable[..., Path]) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSL_HOME", raising=False)
    draw_images(tmp_path / "p" / "cat", range(8))
    return tmp_path


def test_one_place_is_opened_once_however_it_is_spelt(home: Path) -> None:
    sources = Sources()
    found = {id(sources.of(trial(home, n, source=s)[1])) for n, s in enumerate(("p", "./p/"))}
    assert len(found) == len(sources.opened) == 1


def test_trials_of_an_earlier_version_get_absolute_places_that_the_shelf_knows(home: Path) -> None:
    folder, config = trial(home, 0)
    sources = Sources()
    sources.check(config)
    sources.check_unchanged([folder], [], {})
    assert read_mapping(folder.config)["data"]["source"] == str(home / "p")
    assert json.loads(folder.source.read_text())["images"] == 8
    assert len(sources.opened) == 1


def test_a_trial_that_goes_on_refuses_other_images_unless_asked(
    home: Path, draw_images: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = trial(home, 0)
    record_source(folder, Sources().of(config), config)
    checkpoint_path(folder.checkpoints, 1).mkdir(parents=True)
    draw_images(home / "p" / "dog", range(8, 12))
    with pytest.raises(RunFolderError, match="8 then, 12 now"):
        Sources().check_unchanged([folder], [], {})
    Sources().check_unchanged([folder], [], {"data.if_changed": "go_on"})
    assert "trial 0000: the images have changed, and data.if_changed=go_on" in (
        capsys.readouterr().err
    )
    assert read_mapping(folder.config)["data"]["if_changed"] == "go_on"


def test_a_trial_that_begins_is_not_compared_with_those_of_other_images(
    home: Path, draw_images: Callable[..., Path]
) -> None:
    ended, config = trial(home, 0)
    record_source(ended, Sources().of(config), config)
    draw_images(home / "p" / "dog", range(8, 12))
    waiting, _ = trial(home, 1)
    with pytest.raises(RunFolderError, match="since this trial ended") as raised:
        Sources().check_unchanged([waiting], [ended], {})
    assert "data.if_changed=go_on" in str(raised.value)
    Sources().check_unchanged([], [ended], {})  # a sweep that is finished only tells its results
    Sources().check_unchanged([waiting], [ended], {"data.if_changed": "go_on"})
