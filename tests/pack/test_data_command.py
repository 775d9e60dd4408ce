"""`raysl data` as a command: its report, its JSON object and its contact sheet."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from raysl.cli import main


def last_json(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text.splitlines()[-1])
    return values


def test_says_what_is_there_and_draws_it(
    broken_photos: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    sheet = tmp_path / "sheet.png"
    status, printed, said = call("data", broken_photos, "--json", "--contact-sheet", sheet)
    assert status == 0
    summary = last_json(printed)
    assert summary["kind"] == "a folder of image files"
    assert summary["images"] == summary["inspected"] == 30
    assert summary["formats"] == {"jpeg": 28, "unknown": 2}
    assert summary["classes"]["sizes"] == {"cat": 15, "dog": 15}
    assert summary["width"] == {"min": 160, "median": 160, "max": 160}
    assert [Path(bad["name"]).name for bad in summary["broken"]] == ["00.jpg", "01.jpg"]
    assert "cat: 15, dog: 15" in printed
    assert "00.jpg: no bytes" in printed
    assert "-> 6.7% of the images are bad" in printed
    assert f"contact sheet: {sheet}" in said
    assert cv2.imread(str(sheet)).shape[1] == 1800


def test_inspects_a_sample_or_every_image(call: Callable[..., Any]) -> None:
    printed = call("data", "digits", "--sample", "100", "--json").out
    assert last_json(printed)["inspected"] == 100
    assert "100 of 1,347 images drawn evenly at random" in printed
    assert "(estimated)" in printed
    every = call("data", "digits", "limit=200", "--sample", "all", "--json").out
    assert last_json(every)["inspected"] == 200
    assert "every image" in every


@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
def test_a_sample_that_is_no_number_of_images_is_a_usage_error(value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", "digits", f"--sample={value}"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere"], "nowhere"),
        (["digits", "limi=3"], "unknown key 'limi'; did you mean 'limit'?"),
        (["digits", "max_megapixels=0"], "max_megapixels: Input should be greater than 0"),
    ],
)
def test_a_mistake_is_one_message_and_status_one(
    words: list[str], text: str, call: Callable[..., Any]
) -> None:
    status, printed, said = call("data", *words)
    assert (status, printed) == (1, "")
    assert text in said


def test_a_source_of_broken_images_is_reported_and_has_no_sheet(
    tmp_path: Path, call: Callable[..., Any]
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    status, printed, said = call("data", tmp_path, "--contact-sheet", tmp_path / "x.png")
    assert status == 1
    assert "a.jpg: no bytes" in printed
    assert "so there is no contact sheet" in said


def test_names_with_brackets_are_shown_as_they_are(
    broken_photos: Path, call: Callable[..., Any]
) -> None:
    (broken_photos / "cat").rename(broken_photos / "[red]cat[")
    broken_photos.rename(broken_photos.with_name("[bold]x"))
    status, printed, _ = call("data", broken_photos.with_name("[bold]x"))
    assert status == 0
    assert "/[bold]x\n" in printed
    assert "[red]cat[: 15" in printed


def test_writes_nothing_unless_a_sheet_is_requested(
    broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("data", "photos").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
