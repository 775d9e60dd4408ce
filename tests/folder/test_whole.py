import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from raysl.folder.whole import (
    UNFINISHED,
    appears_whole,
    clear_unfinished,
    give_up_name,
    read_json,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt()])
def test_what_fails_leaves_the_older_file_and_nothing_beside(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "deep" / "file.bin"
    with appears_whole(path) as temporary:
        temporary.write_bytes(b"older")

    def fail() -> None:
        with appears_whole(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"older"
    assert names(path.parent) == ["file.bin"]


def test_a_folder_is_exchanged_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("a", "b"):
        with appears_whole(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert names(path) == [content]

    def fail() -> None:
        with appears_whole(path) as temporary:
            temporary.mkdir()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert (names(path), names(tmp_path)) == (["b"], ["folder"])


def test_a_process_that_is_killed_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"older")
    script = (
        "import os, signal; from pathlib import Path\n"
        "from raysl.folder.whole import appears_whole\n"
        "with appears_whole(Path('file.bin')) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"older"
    with appears_whole(path) as temporary:
        temporary.write_bytes(b"newer")
    assert (path.read_bytes(), names(tmp_path)) == (b"newer", ["file.bin"])


def test_the_place_to_write_to_is_hidden_and_ends_as_the_name_does(tmp_path: Path) -> None:
    for shared in (False, True):
        with appears_whole(tmp_path / "a.npz", shared=shared) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(UNFINISHED)
            assert temporary.name.endswith("-a.npz")
            temporary.touch()


def test_two_that_write_the_same_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with appears_whole(path, shared=True) as mine:
        mine.write_text("mine, half")
        other = threading.Thread(target=write_text, args=(path, "other"))
        other.start()
        other.join()
        assert path.read_text() == "other"
        mine.write_text("mine")
    assert (path.read_text(), names(tmp_path)) == ("mine", ["file"])


def test_everything_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_old_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    order: list[str] = []
    sync, rename, remove = os.fsync, Path.rename, shutil.rmtree

    def synced(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def renamed(old: Path, new: Path) -> Path:
        order.append(f"rename {old.name} {new.name}")
        return rename(old, new)

    def removed(old: Path) -> None:
        order.append(f"remove {old.name}")
        remove(old)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    with appears_whole(path, lasting=True) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert order == [
        "sync new",
        "rename folder .tmp-old-folder",
        "rename .tmp-folder folder",
        f"sync {tmp_path.name}",
        "remove .tmp-old-folder",
    ]
    assert names(path) == ["new"]


def test_what_gives_up_its_name_is_cleared_with_what_is_not_finished(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state").touch()
    (tmp_path / f"{UNFINISHED}half").touch()
    (tmp_path / ".lock").touch()
    aside = give_up_name(tmp_path / "one")
    assert (names(aside), (tmp_path / "one").exists()) == (["state"], False)
    clear_unfinished(tmp_path)
    assert names(tmp_path) == [".lock", "two"]


def test_a_folder_that_cannot_take_its_name_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()

    def write() -> None:
        with appears_whole(tmp_path / "folder") as temporary:
            temporary.write_text("a file where a folder is")

    with pytest.raises(OSError, match="directory"):
        write()
    assert names(tmp_path) == ["folder"]


class TestAtomicFiles:
    def test_json_comes_back(self, tmp_path: Path) -> None:
        value = {"a": 1, "b": [1.5, None], "c": {"d": "é"}}
        write_json(tmp_path / "new" / "x.json", value)
        assert read_json(tmp_path / "new" / "x.json") == value

    @pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"'])
    def test_what_is_not_a_whole_object_is_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.json").write_bytes(content)
        assert read_json(tmp_path / "x.json") is None

    @pytest.mark.parametrize("function", ["os.fsync", "pathlib.Path.replace"])
    def test_a_write_that_fails_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        path = tmp_path / "x.json"
        write_json(path, {"old": True})

        def fail(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(function, fail)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"new": True})
        assert read_json(path) == {"old": True}

    def test_nothing_but_the_file_is_left(self, tmp_path: Path) -> None:
        write_text(tmp_path / "a.txt", "one")
        write_text(tmp_path / "a.txt", "two")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "two"}
