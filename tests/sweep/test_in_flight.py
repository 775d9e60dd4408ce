"""Settings that changed under way: what a trial goes on with, and what trained a step."""

from pathlib import Path

import pytest

from raysl.sweep.trial import Change, change_before, newest_change, write_change
from raysl.track.run_folder import RunFolder


def change(step: int, lr: float) -> Change:
    return Change(step, {"optim.base_lr": lr}, {"optim.base_lr": lr})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "0003")
    found.path.mkdir()
    for step, lr in ((0, 0.1), (10, 0.2), (20, 0.4)):
        write_change(found, change(step, lr))
    return found


def test_there_is_none_at_first(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert newest_change(folder) is None
    assert change_before(folder, 10) is None


def test_a_step_was_trained_by_what_was_there_before_it(folder: RunFolder) -> None:
    found = [change_before(folder, step) for step in (1, 10, 11, 20, 21, 99)]
    assert [each.params["optim.base_lr"] for each in found if each] == [
        0.1,
        0.1,
        0.2,
        0.2,
        0.4,
        0.4,
    ]
    assert newest_change(folder) == change(20, 0.4)


def test_going_back_forgets_what_came_later(folder: RunFolder) -> None:
    write_change(folder, change(10, 0.3))
    assert newest_change(folder) == change(10, 0.3)
    assert change_before(folder, 10) == change(0, 0.1)
    assert change_before(folder, 21) == change(10, 0.3)


def test_going_on_with_the_same_is_no_change(folder: RunFolder) -> None:
    write_change(folder, change(30, 0.4))
    assert newest_change(folder) == change(20, 0.4)
