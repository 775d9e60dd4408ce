import re
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from raysl.errors import RunFolderError
from raysl.folder.claim import changes, refusal, set_aside
from raysl.folder.lock import lock_folder


class TestChanges:
    def test_each_value_that_differs_is_a_line(self) -> None:
        old, new = {"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": "x"}
        assert changes(old, new) == ["b: 2 -> 3", "d: None -> x"]

    def test_only_what_is_asked_for_is_compared_and_in_that_order(self) -> None:
        old, new = {"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 3, "c": 4}
        assert changes(old, new, keys=["c", "a"]) == ["c: 3 -> 4", "a: 1 -> 2"]

    def test_what_means_the_same_is_no_change_and_is_shown_as_it_was_given(self) -> None:
        old, new = {"place": "a/b", "text": "a/b"}, {"place": "./a/b", "text": "./a/b"}
        found = changes(
            old,
            new,
            compared=lambda key, value: value.removeprefix("./") if key == "place" else value,
            named={"text": "the text"},
            line="{key}: {old!r} there, {new!r} here",
        )
        assert found == ["the text: 'a/b' there, './a/b' here"]

    def test_braces_in_a_value_are_no_places_to_fill(self) -> None:
        assert changes({"a": "{old}"}, {"a": "{0}"}) == ["a: {old} -> {0}"]


def test_a_refusal_says_where_what_differs_and_what_to_do() -> None:
    changed = ["seed: 1 -> 2", "lr: 3 -> 4"]
    assert refusal(Path("runs/a"), "holds another run", changed) == (
        "runs/a holds another run:\n  seed: 1 -> 2\n  lr: 3 -> 4\n"
        "Give this one another name=..., or --fresh to set the old one aside"
    )
    assert refusal("s3://a", "is", ["x"], instead="Go") == "s3://a is:\n  x\nGo"


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def locked(self) -> AbstractContextManager[None]:
        return lock_folder(self.path, doing="is training in", instead="wait")


class TestSetAside:
    def test_the_name_is_free_and_everything_is_kept_under_the_time(self, tmp_path: Path) -> None:
        folder = Folder(tmp_path / "run")
        folder.path.mkdir()
        (folder.path / "config.yaml").write_text("seed: 1")
        aside = set_aside(folder)
        assert re.fullmatch(r"run\.\d{8}-\d{6}", aside.name)
        assert list(tmp_path.iterdir()) == [aside]
        assert (aside / "config.yaml").read_text() == "seed: 1"

    def test_two_of_one_second_are_both_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("raysl.folder.claim.time.strftime", lambda _: "20260102-030405")
        folder = Folder(tmp_path / "run")
        for text in ("first", "second", "third"):
            folder.path.mkdir()
            (folder.path / "config.yaml").write_text(text)
            set_aside(folder)
        kept = {path.name: (path / "config.yaml").read_text() for path in tmp_path.iterdir()}
        at = "run.20260102-030405"
        assert kept == {at: "first", f"{at}-2": "second", f"{at}-3": "third"}

    def test_one_that_is_written_to_stays(self, tmp_path: Path) -> None:
        folder = Folder(tmp_path / "run")
        with folder.locked(), pytest.raises(RunFolderError, match="is training in this folder"):
            set_aside(folder)
        assert folder.path.is_dir()
