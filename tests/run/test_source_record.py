"""A run folder knows its images: what happens when they change between a stop and a resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.errors import RunFolderError
from raysl.run.recipe import RunConfig, run_from_values
from raysl.run.source_record import record_source
from raysl.sources.source import ArraySource
from raysl.sources.subset import SubsetSource
from raysl.track.run_folder import RunFolder, checkpoint_path


def images(count: int, *, classes: tuple[str, ...] = ("cat", "dog"), seed: int = 0) -> ArraySource:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 4), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % len(classes)
    return ArraySource("photos", pixels, labels, list(classes))


def config(if_changed: str = "stop") -> RunConfig[Any]:
    values = {
        "name": "a-run",
        "data": {"source": "photos", "if_changed": if_changed},
        "method": {"name": "simclr"},
        "train": {"epochs": 2, "global_batch_size": 4},
    }
    return run_from_values(values, where="test")


def trained(folder: RunFolder, step: int) -> None:
    checkpoint_path(folder.checkpoints, step).mkdir(parents=True)


def known(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.source.read_text())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_what_a_run_is_trained_on_is_written_before_it_is(folder: RunFolder) -> None:
    source = images(8)
    source.notes = ("3 .heic files are left out",)
    assert record_source(folder, source, config()) == []
    assert known(folder) == {
        "name": "photos",
        "fingerprint": source.fingerprint,
        "seen": source.fingerprint,
        "images": 8,
        "seen_images": 8,
        "groups": 1,
        "classes": 2,
        "class_names": ["cat", "dog"],
        "notes": ["3 .heic files are left out"],
        "from_step": 0,
    }


def test_the_same_images_go_on_without_a_word(folder: RunFolder) -> None:
    for _ in range(2):
        assert record_source(folder, images(8), config()) == []
        trained(folder, 1 + len(list(folder.path.glob("checkpoints/*"))))


def test_other_images_are_refused_in_words_with_what_to_do(folder: RunFolder) -> None:
    record_source(folder, images(8), config())
    trained(folder, 3)
    before = known(folder)
    with pytest.raises(RunFolderError) as raised:
        record_source(folder, images(12, classes=("cat", "emu", "fox")), config())
    text = str(raised.value)
    assert "the images have changed since this run began" in text
    assert "images of photos: 8 then, 12 now" in text
    assert "classes: 2 then, 3 now; new: emu, fox; gone: dog" in text
    for cure in ("Restore them", "name=...", "--fresh", "data.if_changed=go_on"):
        assert cure in text
    assert known(folder) == before


def test_as_many_other_images_are_told_apart(folder: RunFolder) -> None:
    record_source(folder, images(8), config())
    trained(folder, 3)
    with pytest.raises(RunFolderError, match="8 then, 8 now; the same number, but other files"):
        record_source(folder, images(8, seed=1), config())


def test_going_on_says_so_and_keeps_what_was_known(folder: RunFolder) -> None:
    record_source(folder, images(8), config())
    trained(folder, 3)
    folder.bad_images.write_text('{"row": 7}\n')
    lines = record_source(folder, images(12), config("go_on"))
    assert "from step 3 on, order and length are those of the current images" in lines[0]
    assert "6 steps in total" in lines[0]
    assert "8 then, 12 now" in lines[1]
    assert (known(folder)["images"], known(folder)["from_step"]) == (12, 3)
    assert [each["images"] for each in known(folder)["earlier"]] == [8]
    # Rows of other images are no rows of these.
    assert not folder.bad_images.exists()
    kept = folder.path / f"bad_images.{images(8).fingerprint}.jsonl"
    assert kept.read_text() == '{"row": 7}\n'


def test_going_on_with_fewer_images_may_end_the_run(folder: RunFolder) -> None:
    record_source(folder, images(16), config())
    trained(folder, 5)
    lines = record_source(folder, images(8), config("go_on"))
    assert "step 5 is beyond that, so nothing is left to train" in lines[0]


def test_images_that_nothing_was_trained_on_may_be_put_back(folder: RunFolder) -> None:
    record_source(folder, images(8), config())
    trained(folder, 3)
    record_source(folder, images(12), config("go_on"))  # and fails before its first checkpoint
    assert record_source(folder, images(8), config()) == []
    assert "earlier" not in known(folder)
    record_source(folder, images(12), config("go_on"))
    trained(folder, 4)
    with pytest.raises(RunFolderError, match="12 then, 8 now"):
        record_source(folder, images(8), config())


def test_before_the_first_checkpoint_other_images_are_only_told(folder: RunFolder) -> None:
    record_source(folder, images(8), config())
    (line,) = record_source(folder, images(12), config())
    assert "changed since the first start, which wrote no checkpoint" in line
    assert known(folder)["images"] == 12


def test_a_folder_of_an_earlier_version_learns_its_images_at_the_resume(folder: RunFolder) -> None:
    trained(folder, 3)
    assert record_source(folder, images(8), config()) == []
    with pytest.raises(RunFolderError, match="8 then, 12 now"):
        record_source(folder, images(12), config())


def test_other_labels_seen_of_the_same_images_are_a_change(folder: RunFolder) -> None:
    whole = images(8)
    record_source(folder, SubsetSource(whole, np.arange(6), only=True), config())
    trained(folder, 1)
    with pytest.raises(RunFolderError, match=r"the same images, but .* 6 then, 8 now"):
        record_source(folder, whole, config())
