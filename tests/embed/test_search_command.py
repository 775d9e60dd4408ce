"""`raysl search` as a command: neighbours of files, of rows, and of every image."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from raysl.cli import main
from raysl.embed.embeddings import Embeddings

Results = Callable[..., dict[str, Any]]


def test_a_query_finds_its_copy_and_a_row_its_own(
    embedded: Any, tmp_path: Path, results_of: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, out = tmp_path / "grid.png", tmp_path / "neighbors.parquet"
    query = embedded.photos / "class1" / "021.png"
    command = ["search", str(embedded.out), "--query", str(query), "-k", "3", "--json"]
    assert main([*command, "--grid", str(grid), "--out", str(out)]) == 0
    printed, said = capsys.readouterr()
    (result,) = json.loads(printed.splitlines()[-1])["queries"]
    near = result["neighbors"]
    assert [each["id"] for each in near[:2]] == ["class0/z_copy.png", "class1/021.png"]
    assert near[0]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert near[0]["label"] == "class0"
    assert "class0/z_copy.png" in printed
    assert f"drawn: {grid}" in said
    assert cv2.imread(str(grid)) is not None
    assert pq.read_table(out).column("neighbor_ids").to_pylist() == [[each["id"] for each in near]]
    rows = results_of("search", embedded.out, "--rows", near[0]["row"], "-k", "1")
    assert rows["queries"][0]["neighbors"][0]["id"] == "class1/021.png"
    assert rows["queries"][0]["label"] == "class0"


def test_a_folder_of_queries_is_searched_file_by_file(
    embedded: Any, results_of: Results, tmp_path: Path
) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    for number in (3, 5):
        copied = (embedded.photos / "class1" / f"{number:03}.png").read_bytes()
        (folder / f"{number}.png").write_bytes(copied)
    results = results_of("search", embedded.out, "--query", folder, "-k", "1", "--center")
    assert [query["query"] for query in results["queries"]] == ["3.png", "5.png"]
    nearest = [query["neighbors"][0]["id"] for query in results["queries"]]
    assert nearest == ["class1/003.png", "class1/005.png"]


def test_without_a_query_every_image_gets_its_neighbours(
    embedded: Any, tmp_path: Path, results_of: Results
) -> None:
    grid = tmp_path / "grid.png"
    results = results_of("search", embedded.out, "-k", "4", "--grid", grid)
    table = pq.read_table(embedded.out / "_neighbors.parquet").to_pandas()
    assert table["row"].tolist() == list(range(43))
    neighbors = table.set_index("row")["neighbor_rows"]
    assert all(row not in near for row, near in neighbors.items())
    similarities = np.stack(table["similarities"])
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert results["mean_nearest_similarity"] == pytest.approx(similarities[:, 0].mean())
    labels = np.array([name.partition("/")[0] for name in table["id"]])
    nearest = np.array([near[0] for near in table["neighbor_rows"]])
    assert results["nearest_has_same_label"] == pytest.approx((labels == labels[nearest]).mean())
    assert cv2.imread(str(grid)) is not None
    # Files beside the shards do not disturb other readers.
    assert len(pd.read_parquet(embedded.out)) == 43


def test_another_encoder_cannot_embed_a_query_and_a_moved_one_is_named(
    embedded: Any, tiny_encoder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", str(embedded.out), "--query", str(embedded.photos / "class1/021.png")]
    assert main([*command, "--encoder", str(tiny_encoder("other", seed=3))]) == 1
    assert "not the encoder" in capsys.readouterr().err
    moved = embedded.encoder.rename(embedded.encoder.with_name("moved.safetensors"))
    assert main(command) == 1
    assert "no encoder there" in capsys.readouterr().err
    assert main([*command, "--encoder", str(moved)]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rows", "1,x"], "give whole numbers"),
        (["--rows", "5000"], "row 5000 has no features"),
        (["-k", "0"], "give at least 1"),
    ],
)
def test_a_mistake_is_one_message_and_status_one(
    words: list[str],
    text: str,
    tmp_path: Path,
    write_embeddings: Callable[..., Embeddings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_embeddings(tmp_path / "out", np.eye(4, dtype=np.float32))
    assert main(["search", str(tmp_path / "out"), *words]) == 1
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said


def test_a_query_that_is_missing_or_no_image_is_named(
    embedded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", str(embedded.out), "--query"]
    assert main([*command, "none.png"]) == 1
    assert "--query none.png: no such file" in capsys.readouterr().err
    (tmp_path / "text.png").write_bytes(b"<html>")
    assert main([*command, str(tmp_path / "text.png")]) == 1
    assert "text.png: " in capsys.readouterr().err


def test_a_folder_without_embeddings_or_without_an_image_is_refused(
    tmp_path: Path,
    write_embeddings: Callable[..., Embeddings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["search", str(tmp_path)]) == 1
    assert "holds no embeddings" in capsys.readouterr().err
    write_embeddings(tmp_path / "out", np.empty((0, 4), dtype=np.float32))
    assert main(["search", str(tmp_path / "out")]) == 1
    assert "no image has features" in capsys.readouterr().err


def test_files_and_rows_exclude_each_other() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["search", "out", "--query", "x.png", "--rows", "1"])
