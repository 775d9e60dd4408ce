"""`raysl duplicates` as a command: groups, the list of images to drop, and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest

from raysl.cli import main
from raysl.embed.embeddings import Embeddings
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig

Results = Callable[..., dict[str, Any]]


def test_planted_copies_are_grouped_and_a_filter_drops_them(
    embedded: Any, tmp_path: Path, results_of: Results
) -> None:
    sheet, drop = tmp_path / "sheet.png", tmp_path / "drop.txt"
    results = results_of(
        "duplicates", embedded.out, "--threshold", "0.97", "--drop", drop, "--contact-sheet", sheet
    )
    table = pd.read_parquet(embedded.out / "_duplicates.parquet")
    assert {tuple(group["id"]) for _, group in table.groupby("group")} == {
        ("class0/010.png", "class0/z_big.jpg"),
        ("class0/z_copy.png", "class1/021.png"),
        ("class1/031.png", "class1/z_again.jpg"),
    }
    assert results["groups_of_several_labels"] == 1
    assert results["with_neighbor_above"]["0.97"] == 6
    assert results["to_drop"] == 3
    assert cv2.imread(str(sheet)).shape[0] > 100
    config = DataConfig(source=str(embedded.photos), filter=(("path", "not in file", str(drop)),))
    assert int(open_source(config, data=config).group_sizes.sum()) == 40
    csv = tmp_path / "groups.csv"
    results_of("duplicates", embedded.out, "--threshold", "0.97", "--out", csv)
    assert pd.read_csv(csv)["id"].tolist() == table["id"].tolist()


class TestGivenFeatures:
    @pytest.fixture
    def out(self, tmp_path: Path, write_embeddings: Callable[..., Embeddings]) -> Path:
        """Five images of two directions: rows 0, 1, 3 and rows 4, 6."""
        features = np.array([[1, 0], [2, 0], [3, 0], [0, 1], [0, 2]], dtype=np.float32)
        write_embeddings(tmp_path / "out", features, labels=np.array([0, 0, -1, 1, 0]))
        return tmp_path / "out"

    def test_keeps_the_first_of_a_group_and_says_how_to_drop_the_others(
        self, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["duplicates", str(out), "--no-center"]) == 0
        printed, said = capsys.readouterr()
        assert (
            "2 groups at similarity 0.98 (1 of them with several labels); 3 of 5 images to drop"
            in printed
        )
        assert (out / "_drop.txt").read_text().splitlines() == ["1.png", "3.png", "6.png"]
        condition = f'data.filter=[[row_id, not in file, "{out}/_drop.txt"]]'
        assert f"to leave them out: '{condition}'" in said
        table = pd.read_parquet(out / "_duplicates.parquet")
        assert table["row"].tolist() == [0, 1, 3, 4, 6]
        assert table["keep"].tolist() == [True, False, False, True, False]
        assert table["like_row"].tolist() == [0, 0, 0, 4, 4]

    def test_without_groups_there_is_nothing_to_drop_or_to_draw(
        self,
        tmp_path: Path,
        write_embeddings: Callable[..., Embeddings],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        write_embeddings(tmp_path / "apart", np.eye(3, dtype=np.float32))
        sheet = tmp_path / "sheet.png"
        command = ["duplicates", str(tmp_path / "apart"), "--no-center"]
        assert main([*command, "--contact-sheet", str(sheet)]) == 0
        printed, said = capsys.readouterr()
        assert "0 groups at similarity 0.98; 0 of 3 images to drop" in printed
        assert "no groups at similarity 0.98: nothing was drawn" in said
        assert "to leave them out" not in said
        assert not sheet.exists()
        assert (tmp_path / "apart" / "_drop.txt").read_text() == ""

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--threshold", "1.5"], "--threshold 1.5: give a number in (0, 1]"),
            (["--threshold", "0"], "give a number in (0, 1]"),
            (["--threshold", "nan"], "give a number in (0, 1]"),
            (["--out", "x.json"], "give a .parquet or a .csv file"),
        ],
    )
    def test_a_mistake_is_one_message_and_writes_nothing(
        self, words: list[str], text: str, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["duplicates", str(out), *words]) == 1
        assert text in capsys.readouterr().err
        assert not (out / "_drop.txt").exists()
