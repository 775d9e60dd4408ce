"""Which settings of a sweep may change between two starts in one folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import read_mapping
from raysl.errors import RunFolderError
from raysl.sweep.config import SweepConfig
from raysl.sweep.trial import SweepFolder, claim

Make = Callable[..., SweepConfig]
SPACE = {"method.temperature": {"grid": [0.1, 0.5]}}


@pytest.fixture
def folder(tmp_path: Path, sweep_of: Make) -> SweepFolder:
    """The folder of a sweep that has begun."""
    made = SweepFolder(tmp_path / "s")
    made.path.mkdir()
    claim(made, sweep_of(space=SPACE, search={"name": "grid"}))
    return made


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"budget": {"hours": 2.0}},
        {"retries": 5},
        {"track": {"mlflow": False}},
        {"resources": {"cpus_per_trial": 2.0}},
        {"metric": {"also": ["train/loss"]}},
        {"set": {"data.if_changed": "go_on"}},
    ],
)
def test_what_may_change_is_written_down(
    folder: SweepFolder, sweep_of: Make, sections: dict[str, Any]
) -> None:
    claim(folder, sweep_of(space=SPACE, search={"name": "grid"}, **sections))
    kept = read_mapping(folder.config)
    assert list(kept["space"]) == list(SPACE)
    for section, values in sections.items():
        if isinstance(values, dict):
            assert values.items() <= kept[section].items()
        else:
            assert kept[section] == values


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"space": {"method.temperature": {"grid": [0.1, 0.9]}}}, "space.method.temperature"),
        ({"scheduler": {"name": "asha"}}, "scheduler.name: none -> asha"),
        ({"set": {"train.epochs": 9}}, "set.train.epochs: None -> 9"),
    ],
)
def test_another_sweep_is_refused_and_leaves_the_folder(
    folder: SweepFolder, sweep_of: Make, sections: dict[str, Any], told: str
) -> None:
    before = folder.config.read_bytes()
    with pytest.raises(RunFolderError, match="holds another sweep") as caught:
        claim(folder, sweep_of(**({"space": SPACE, "search": {"name": "grid"}} | sections)))
    assert told in str(caught.value)
    assert "Give this one another name=..." in str(caught.value)
    assert folder.config.read_bytes() == before


def test_the_same_base_in_another_folder_is_the_same(
    folder: SweepFolder, sweep_of: Make, base: Path, tmp_path: Path
) -> None:
    """A job's working folder is another one each time."""
    moved = tmp_path / "elsewhere" / base.name
    moved.parent.mkdir()
    moved.write_text(base.read_text())
    claim(folder, sweep_of(space=SPACE, search={"name": "grid"}, base=str(moved)))
