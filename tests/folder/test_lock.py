import os
from pathlib import Path

import pytest

from raysl.errors import DataError, RunFolderError
from raysl.folder.lock import LOCK, lock_folder


def test_the_one_that_comes_second_is_told_who_holds_it_and_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with (
        lock_folder(folder, doing="writes into", instead="give another folder", error=DataError),
        pytest.raises(DataError) as caught,
        lock_folder(folder, doing="writes into", instead="give another folder", error=DataError),
    ):
        pytest.fail("two hold the folder")
    assert str(caught.value) == (
        f"{folder}: process {os.getpid()} writes into this folder; wait for it, or give another "
        f"folder"
    )


def test_who_came_second_leaves_the_lock_as_it_is(tmp_path: Path) -> None:
    with lock_folder(tmp_path, doing="is training in", instead="go"):
        for _ in range(2):
            with (
                pytest.raises(RunFolderError),
                lock_folder(tmp_path, doing="waits for", instead="go"),
            ):
                pass
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    with lock_folder(tmp_path, doing="is training in", instead="go"):
        pass


def test_what_goes_wrong_inside_is_not_taken_for_a_folder_that_cannot_be_written(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(FileNotFoundError, match="no such image"),
        lock_folder(tmp_path, doing="is training in", instead="go"),
    ):
        raise FileNotFoundError("no such image")


def test_a_folder_that_cannot_be_made_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    with (
        pytest.raises(RunFolderError) as caught,
        lock_folder(
            folder, doing="is training in", instead="go", elsewhere="give a folder that can"
        ),
    ):
        pass
    assert str(caught.value) == (
        f"{folder}: cannot be written: Not a directory; give a folder that can"
    )
