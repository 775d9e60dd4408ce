"""`raysl pack` and `raysl data` as a person uses them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from raysl.cli import main

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty photographs in two classes, two of them broken."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for number in range(30):
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (160, 120))
        path = root / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    (root / "cat" / "00.jpg").write_bytes(b"")
    (root / "dog" / "01.jpg").write_bytes(b"<html>")
    return root


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def last_json(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text.splitlines()[-1])
    return values


class TestPack:
    def test_packs_says_what_it_did_and_what_comes_next(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        words = ["pack", str(photos), str(out), "num_workers=0", "short_side_px=60"]
        status, text, _ = call(capsys, *words, "max_bad_share=0.1", "--json")
        assert status == 0
        result = last_json(text)
        assert result["images"] == 28
        assert result["bad_images"] == 2
        assert result["shards"] == 1
        assert result["output"] == str(out)
        assert result["bytes_in"] == sum(p.stat().st_size for p in photos.rglob("*.jpg"))
        assert result["bytes_out"] == (out / "part-00000.parquet").stat().st_size
        assert f"raysl pretrain CONFIG data.source={out}" in text
        table = pq.read_table(out / "part-00000.parquet")
        assert set(table.column("height").to_pylist()) == {60}
        assert json.loads((out / "manifest.json").read_text())["class_names"] == ["cat", "dog"]

    def test_the_same_command_again_has_nothing_to_do_and_starts_no_ray(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = call(capsys, "pack", "digits", str(tmp_path), "num_workers=0", "--json")
        monkeypatch.setattr("raysl.pack.command.connect", lambda: pytest.fail("Ray was started"))
        again = call(capsys, "pack", "digits", str(tmp_path), "--json")
        assert "already packed" in again[2]
        results = [last_json(found[1]) for found in (first, again)]
        for values in results:
            del values["seconds"], values["complete_before"]
        assert results[0] == results[1]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["max_bad_share=0.01"], "2 of 30 images are bad so far"),
            (["quality=101"], "quality: Input should be less than or equal to 100, got 101"),
            (["short_side=256"], "unknown key 'short_side'; did you mean 'short_side_px'?"),
            (["source=other"], "give the source once"),
        ],
    )
    def test_a_mistake_is_one_message_and_status_one(
        self, words: list[str], message: str, photos: Path, tmp_path: Path, capsys: Any
    ) -> None:
        out = str(tmp_path / "out")
        status, _, error = call(capsys, "pack", str(photos), out, "num_workers=0", *words)
        assert status == 1
        assert message in error
        assert "Traceback" not in error

    def test_what_is_packed_is_a_source_of_a_run(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = str(run_yaml("packed"))
        assert main(["pack", "digits", "out", "num_workers=0", "shard_mib=0.1"]) == 0
        words = ["data.source=out", "data.limit=null"]
        status, text, _ = call(capsys, "config", config, *words, "--json")
        assert status == 0
        assert last_json(text)["derived"]["num_images"] == 1347


class TestData:
    def test_tells_what_is_there(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sheet = tmp_path / "sheet.png"
        status, text, _ = call(capsys, "data", str(photos), "--json", "--contact-sheet", str(sheet))
        assert status == 0
        found = last_json(text)
        assert found["images"] == found["inspected"] == 30
        assert found["formats"] == {"jpeg": 28, "unknown": 2}
        assert found["classes"]["sizes"] == {"cat": 15, "dog": 15}
        assert found["width"] == {"min": 160, "median": 160, "max": 160}
        assert [Path(bad["name"]).name for bad in found["broken"]] == ["00.jpg", "01.jpg"]
        assert "cat: 15, dog: 15" in text
        assert "00.jpg: no bytes" in text
        assert cv2.imread(str(sheet)).shape[1] == 1800

    def test_looks_at_a_sample_if_told_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, text, _ = call(capsys, "data", "digits", "--sample", "100", "--json")
        assert last_json(text)["inspected"] == 100
        assert "100 of 1,347 images drawn evenly at random" in text
        _, text, _ = call(capsys, "data", "digits", "--sample", "all", "--json")
        assert last_json(text)["inspected"] == 1347

    def test_only_broken_images_is_no_traceback(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.jpg").write_bytes(b"")
        status, text, error = call(
            capsys, "data", str(tmp_path), "--contact-sheet", str(tmp_path / "x.png")
        )
        assert status == 1
        assert "a.jpg: no bytes" in text
        assert "no image that a contact sheet could show" in error

    def test_names_with_brackets_are_shown_as_they_are(
        self, photos: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (photos / "cat").rename(photos / "[red]cat[")
        photos.rename(photos.with_name("[bold]x"))
        status, text, _ = call(capsys, "data", str(photos.with_name("[bold]x")))
        assert status == 0
        assert "/[bold]x\n" in text
        assert "[red]cat[: 15" in text

    def test_writes_nothing_unless_asked(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["data", "photos"]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("verb", ["pack", "data"])
def test_the_pipeline_is_the_same_command(verb: str) -> None:
    words = [sys.executable, str(PIPELINES / f"{verb}.py"), "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: raysl {verb}")
