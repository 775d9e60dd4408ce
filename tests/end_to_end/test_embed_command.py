"""`raysl embed`, `raysl search` and `raysl duplicates` from first to last."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from raysl.cli import main
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*words: str) -> dict[str, Any]:
        assert main([*words, "--json"]) == 0
        results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return results

    return run


@pytest.fixture
def embedded(
    photos: Path, tiny_encoder: Callable[..., Path], said: Callable[..., dict[str, Any]]
) -> Path:
    """Photos with planted copies: one re-encoded, one resized, one byte for byte."""
    (photos / "class0" / "broken.png").unlink()
    first = cv2.imread(str(photos / "class0" / "010.png"))
    big = cv2.resize(first, (240, 200), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(photos / "class0" / "z_big.jpg"), big, [cv2.IMWRITE_JPEG_QUALITY, 95])
    shutil.copy(photos / "class1" / "021.png", photos / "class0" / "z_copy.png")
    second = cv2.imread(str(photos / "class1" / "031.png"))
    cv2.imwrite(str(photos / "class1" / "z_again.jpg"), second, [cv2.IMWRITE_JPEG_QUALITY, 98])
    out = photos.parent / "out"
    words = ["embed", str(photos), str(tiny_encoder().parent), str(out), "num_workers=0"]
    results = said(*words)
    assert (results["images"], results["bad_images"], results["complete_before"]) == (103, 0, False)
    assert said(*words)["complete_before"]
    return out


def test_planted_copies_are_found_and_a_filter_drops_them(
    embedded: Path, photos: Path, tmp_path: Path, said: Callable[..., dict[str, Any]]
) -> None:
    sheet, drop = tmp_path / "sheet.png", tmp_path / "drop.txt"
    results = said(
        "duplicates", str(embedded), "--threshold", "0.97", "--drop", str(drop),
        "--contact-sheet", str(sheet),
    )  # fmt: skip
    groups = pd.read_parquet(embedded / "_duplicates.parquet")
    found = {tuple(part["id"]) for _, part in groups.groupby("group")}
    planted = {
        ("class0/010.png", "class0/z_big.jpg"),
        ("class0/z_copy.png", "class1/021.png"),
        ("class1/031.png", "class1/z_again.jpg"),
    }
    assert found == planted
    assert results["groups_of_several_labels"] == 1
    assert results["with_neighbor_above"]["0.97"] == 6
    assert cv2.imread(str(sheet)).shape[0] > 100
    condition = ("path", "not in file", str(drop))
    config = DataConfig(source=str(photos), filter=(condition,))
    assert int(open_source(config, data=config).group_sizes.sum()) == 100
    csv = tmp_path / "groups.csv"
    said("duplicates", str(embedded), "--threshold", "0.97", "--out", str(csv))
    assert pd.read_csv(csv)["id"].tolist() == groups["id"].tolist()


def test_a_query_finds_its_copy_and_all_find_their_neighbours(
    embedded: Path, photos: Path, tmp_path: Path, said: Callable[..., dict[str, Any]]
) -> None:
    grid, out = tmp_path / "grid.png", tmp_path / "found.parquet"
    query = str(photos / "class1" / "021.png")
    results = said(
        "search", str(embedded), "--query", query, "-k", "3", "--grid", str(grid), "--out", str(out)
    )
    near = results["queries"][0]["neighbors"]
    assert [each["id"] for each in near[:2]] == ["class0/z_copy.png", "class1/021.png"]
    assert near[0]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert cv2.imread(str(grid)) is not None
    assert pq.read_table(out).column("neighbor_ids").to_pylist() == [[each["id"] for each in near]]
    rows = said("search", str(embedded), "--rows", f"{near[0]['row']}", "-k", "1")
    assert rows["queries"][0]["neighbors"][0]["id"] == "class1/021.png"
    said("search", str(embedded), "-k", "4", "--grid", str(grid))
    table = pq.read_table(embedded / "_neighbors.parquet").to_pandas()
    assert table["row"].tolist() == list(range(103))
    mine = table.set_index("row")["neighbor_rows"]
    assert mine[near[0]["row"]][0] == near[1]["row"]
    assert all(row not in near for row, near in mine.items())
    assert (np.diff(np.stack(table["similarities"]), axis=1) <= 0).all()
    # What lies beside the shards does not spoil them for others.
    assert len(pd.read_parquet(embedded)) == 103


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["search", "{out}", "--rows", "1,x"], "give whole numbers"),
        (["search", "{out}", "--rows", "5000"], "row 5000 has no features"),
        (["search", "{out}", "-k", "0"], "give at least 1"),
        (["search", "{out}", "--query", "none.png"], "no such image"),
        (["search", "{photos}"], "holds no embeddings"),
        (["duplicates", "{out}", "--threshold", "1.5"], "give a number in (0, 1]"),
        (["duplicates", "{out}", "--out", "x.json"], "give a .parquet or a .csv file"),
        (["embed", "{photos}", "{photos}", "{out}"], "no encoder there"),
        (["embed", "{photos}", "{encoder}", "{out}", "size_px=12"], "size_px: 16 there, 12 here"),
    ],
)
def test_one_message_says_what_is_wrong(
    words: list[str],
    text: str,
    embedded: Path,
    photos: Path,
    tiny_encoder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"out": str(embedded), "photos": str(photos), "encoder": str(tiny_encoder())}
    assert main([word.format(**places) for word in words]) == 1
    assert text in capsys.readouterr().err


def test_another_encoder_cannot_embed_the_query(
    embedded: Path,
    photos: Path,
    tiny_encoder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = str(tiny_encoder("other", seed=3))
    query = str(photos / "class1" / "021.png")
    assert main(["search", str(embedded), "--query", query, "--encoder", other]) == 1
    assert "not the encoder" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_embed_on_ray(
    tiny_encoder: Callable[..., Path], tmp_path: Path, said: Callable[..., dict[str, Any]]
) -> None:
    encoder, out = str(tiny_encoder()), str(tmp_path / "out")
    results = said("embed", "digits", encoder, out, "num_workers=2", "limit=300")
    assert results["images"] == results["made"] == 300
