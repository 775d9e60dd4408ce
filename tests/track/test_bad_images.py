import errno
import json
from pathlib import Path

import pytest

from raysl.errors import DataError, RunFolderError
from raysl.track.bad_images import BadImages


def _list(path: Path, *, max_share: float = 0.5, writes: bool = True) -> BadImages:
    return BadImages(
        path,
        num_images=10,
        max_share=max_share,
        name=lambda row: f"photo {row}",
        row_id=lambda row: f"{row}.jpg",
        reason=lambda row, flaw: f"flaw {flaw} of {row}",
        writes=writes,
    )


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lists_each_image_once_with_name_reason_and_step(tmp_path: Path) -> None:
    bad = _list(tmp_path / "bad.jsonl")
    assert bad.add({7: 3, 2: 1}, step=5) == 2
    assert bad.add({2: 1, 4: 1}, step=9) == 3
    assert len(bad) == 3
    assert _lines(tmp_path / "bad.jsonl") == [
        {"row": 2, "id": "2.jpg", "name": "photo 2", "reason": "flaw 1 of 2", "step": 5},
        {"row": 7, "id": "7.jpg", "name": "photo 7", "reason": "flaw 3 of 7", "step": 5},
        {"row": 4, "id": "4.jpg", "name": "photo 4", "reason": "flaw 1 of 4", "step": 9},
    ]


def test_a_resumed_run_goes_on_with_the_list(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    _list(path).add({1: 1, 2: 1}, step=1)
    with open(path, "a") as file:
        file.write('[1]\n{"row": "3"}\n')  # not written by raysl
        file.write('{"row": 9, "na')  # cut short by a crash
    again = _list(path)
    assert len(again) == 2
    assert again.add({2: 1}, step=3) == 2


def test_other_ranks_count_without_writing(tmp_path: Path) -> None:
    bad = _list(tmp_path / "bad.jsonl", writes=False)
    assert bad.add({1: 1}, step=1) == 1
    assert not (tmp_path / "bad.jsonl").exists()


def test_more_than_the_largest_share_is_an_error_that_names_one(tmp_path: Path) -> None:
    bad = _list(tmp_path / "bad.jsonl", max_share=0.2)
    bad.add({1: 1, 2: 1}, step=1)
    with pytest.raises(DataError, match=r"^3 of 10 images are bad, such as photo 8: flaw 4 of 8; "):
        bad.add({8: 4}, step=2)
    assert len(_lines(tmp_path / "bad.jsonl")) == 3


def test_records_wait_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = _list(tmp_path / "bad.jsonl")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("raysl.track.bad_images.open", full, raising=False)
        assert bad.add({2: 1}, step=1) == 1
        with pytest.raises(RunFolderError, match=r"bad\.jsonl: cannot be written: No space left"):
            bad.close()
    assert bad.add({3: 1}, step=2) == 2
    assert [line["row"] for line in _lines(tmp_path / "bad.jsonl")] == [2, 3]
    bad.close()
