from pathlib import Path
from typing import Any

import pytest

from raysl.evaluate.protocol import EvaluateConfig
from raysl.sources.belonging import (
    OF_SOURCE,
    OF_TEST_SOURCE,
    named_source,
    without_other_source,
)
from raysl.sources.source import DataConfig

STAYS = {"torchvision_root", "bad_images", "views", "color_on", "mean", "std", "shuffle_window_mib"}
DATA: dict[str, Any] = {
    "source": "/old",
    "mix": [{"source": "/more"}],
    "filter": [["a", ">", 1]],
    "limit": 9,
    "color_profile": "convert",
    "mean": [0.5, 0.5, 0.5],
}
RUN = {
    "data": DATA,
    "evaluate": {"source": "/tests", "label_column": "fine", "limit": None, "every": None},
}


def test_every_setting_of_images_either_leaves_or_stays() -> None:
    assert set(OF_SOURCE) | STAYS == set(DataConfig.model_fields)
    assert not set(OF_SOURCE) & STAYS
    assert set(OF_TEST_SOURCE) <= set(EvaluateConfig.model_fields)


def test_other_images_take_nothing_of_the_old_ones_and_their_test_images_go_too() -> None:
    kept, left = without_other_source(RUN, source="/new", test_source=None)
    assert kept == {"data": {"mean": [0.5, 0.5, 0.5]}, "evaluate": {"every": None}}
    assert left == [
        "data.filter=[['a', '>', 1]]",
        "data.limit=9",
        "data.mix=[{'source': '/more'}]",
        "evaluate.source=/tests",
        "evaluate.label_column=fine",
    ]
    assert RUN["data"] is DATA


def test_other_test_images_leave_the_training_images_alone() -> None:
    kept, left = without_other_source(RUN, source=None, test_source="/others")
    assert (kept["data"], kept["evaluate"]) == (DATA, {"every": None})
    assert left == ["evaluate.source=/tests", "evaluate.label_column=fine"]


@pytest.mark.parametrize("source", [None, "/old", "/old/", "/x/../old", "file:///old"])
def test_the_same_place_is_no_other_source(source: str | None) -> None:
    assert without_other_source(RUN, source=source, test_source="/tests") == (RUN, [])


def test_an_old_run_names_its_images_from_the_folder_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "started" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = {"data": {"source": "photos", "limit": 3}}
    first = [tmp_path / "started"]
    _, left = without_other_source(run, source="started/photos", test_source=None, first=first)
    assert left == []
    _, left = without_other_source(run, source="photos", test_source=None, first=first)
    assert left == ["data.limit=3"]


def test_the_last_name_counts_and_a_whole_section_names_one_too() -> None:
    assert named_source(["data.source=a", "data.limit=1", "data.source=b"], "data.source") == "b"
    assert named_source(["data={source: c}"], "data.source") == "c"
    assert named_source(["data.source=a", "data={limit: 1}"], "data.source") is None
    assert named_source(["evaluate.source=a"], "data.source") is None
    assert named_source([], "data.source") is None
