"""The contact sheet: all images are on it, whole, inside the paper, under their names."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from raysl.augment.crop import Image
from raysl.errors import DataError
from raysl.report.contact_sheet import _MARGIN_IN, WIDTH_IN, _arrange, draw_contact_sheet
from raysl.report.figure import DPI


def plain(height: int, width: int, color: tuple[int, int, int]) -> Image:
    return np.full((height, width, 3), color, dtype=np.uint8)


def read(path: Path) -> Image:
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)  # type: ignore[return-value]


class TestDrawContactSheet:
    def test_shows_every_image_once_and_whole(self, tmp_path: Path) -> None:
        sizes = [(30, 40), (40, 30), (32, 32), (20, 90), (90, 20), (300, 400), (8, 8)] * 3
        colors = [(10 * n, 255 - 10 * n, 100) for n in range(len(sizes))]
        images = [plain(*size, color) for size, color in zip(sizes, colors, strict=True)]
        path = tmp_path / "sheet.png"
        draw_contact_sheet(path, images, captions=None, title="x")
        sheet = read(path)
        for (height, width), color in zip(sizes, colors, strict=True):
            rows, columns = np.nonzero((sheet == color).all(axis=-1))
            high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) > 0.95 * high * wide
            assert wide / high == pytest.approx(width / height, rel=0.06)

    def test_is_as_wide_as_it_should_be_and_only_as_high_as_it_must(self, tmp_path: Path) -> None:
        heights = []
        for count in (2, 40):
            path = tmp_path / f"{count}.png"
            images = [plain(30, 30, (200, 0, 0))] * count
            draw_contact_sheet(path, images, captions=["a"] * count, title="x")
            assert read(path).shape[1] == WIDTH_IN * DPI
            heights.append(read(path).shape[0])
        assert heights[0] < heights[1] / 2

    def test_names_of_any_letters_and_length_are_drawn_without_a_warning(
        self, tmp_path: Path
    ) -> None:
        names = ["$x_1$", "\u732b", "a name that is far too long for its image", "", "two\nlines"]
        images = [plain(90, 30, (0, 0, 0))] * len(names)
        draw_contact_sheet(tmp_path / "a.png", images, captions=names, title="$\\alpha$")
        assert read(tmp_path / "a.png").size

    def test_no_image_is_an_error_that_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there are no images"):
            draw_contact_sheet(tmp_path / "a.png", [], captions=None, title="x")

    def test_a_path_that_cannot_be_written_is_one_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(DataError, match="cannot be written"):
            draw_contact_sheet(
                tmp_path / "file" / "a.png", [plain(3, 3, (0, 0, 0))], captions=None, title="x"
            )


class TestArrange:
    def test_full_rows_are_as_wide_as_the_sheet_and_no_higher_than_usual(self) -> None:
        aspects = np.random.default_rng(0).uniform(0.4, 2.5, 60).tolist()
        rows = _arrange(aspects)
        assert [n for row in rows for n in row.indices] == list(range(60))
        for row in rows[:-1]:
            wide = sum(aspects[n] for n in row.indices) * row.height_in
            wide += 0.06 * (len(row.indices) - 1)
            assert wide == pytest.approx(WIDTH_IN - 2 * _MARGIN_IN)
            assert 0.6 < row.height_in <= 1.0
