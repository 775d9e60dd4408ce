from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from raysl.data.decode import decode
from raysl.errors import DataError
from raysl.report.feature_map import draw_map

MAGENTA = (255, 0, 255)


def draw(
    path: Path,
    features: npt.NDArray[Any],
    labels: list[int] | npt.NDArray[np.int64] | None = None,
    *,
    class_names: list[str] | None = None,
    side_px: int = 8,
) -> npt.NDArray[np.uint8]:
    """Draw a map whose thumbnails are all magenta and return it as ``(H, W, 3)`` RGB."""
    count = len(features)
    thumbnails = np.full((count, side_px, side_px, 3), MAGENTA, dtype=np.uint8)
    draw_map(
        path,
        features=features,
        labels=np.full(count, -1) if labels is None else np.asarray(labels, dtype=np.int64),
        class_names=class_names or [],
        thumbnails=thumbnails,
    )
    return decode(path.read_bytes(), where=path.name)


def num_thumbnails(image: npt.NDArray[np.uint8]) -> int:
    found, _ = cv2.connectedComponents((image == MAGENTA).all(axis=2).astype(np.uint8))
    return int(found) - 1


def blobs(count: int, dim: int = 6) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)


class TestDrawMap:
    def test_draws_some_forty_images_and_never_one_over_another(self, tmp_path: Path) -> None:
        image = draw(tmp_path / "a.png", blobs(150), [0, 1, 2] * 50, class_names=["a", "b", "c"])
        assert 25 <= num_thumbnails(image) <= 40

    def test_shows_more_images_without_labels(self, tmp_path: Path) -> None:
        labelled = draw(tmp_path / "a.png", blobs(100), [0] * 100)
        unlabelled = draw(tmp_path / "b.png", blobs(100))
        assert num_thumbnails(unlabelled) > num_thumbnails(labelled)

    def test_images_with_like_features_lie_together(self, tmp_path: Path) -> None:
        near = np.random.default_rng(0).normal(size=(40, 5)) * 0.01
        near[:20, 0] += 1
        near[20:, 1] += 1
        image = draw(tmp_path / "a.png", near, [0] * 20 + [1] * 20).astype(int)
        # The two classes' colours, wherever they are drawn in the map itself.
        places = [
            np.argwhere((image[:1280] == color).all(axis=2)).mean(axis=0)
            for color in ((0xCC, 0x66, 0x77), (0x33, 0x22, 0x88))
        ]
        assert np.abs(places[0] - places[1]).max() > 400

    @pytest.mark.parametrize("count", [1, 2, 5, 19, 20, 25])
    def test_draws_few_images(self, tmp_path: Path, count: int) -> None:
        image = draw(tmp_path / "a.png", blobs(count), np.arange(count) % 2)
        assert 1 <= num_thumbnails(image) <= count

    @pytest.mark.parametrize("features", [np.ones((30, 4)), np.zeros((30, 4)), np.ones((3, 1))])
    def test_draws_features_that_are_all_the_same(
        self, tmp_path: Path, features: npt.NDArray[Any]
    ) -> None:
        assert num_thumbnails(draw(tmp_path / "a.png", features)) == 1

    def test_draws_features_of_one_dimension(self, tmp_path: Path) -> None:
        signs = np.array([[1.0], [-1.0]] * 15)
        assert num_thumbnails(draw(tmp_path / "a.png", signs)) == 2

    def test_leaves_out_features_that_are_not_finite(self, tmp_path: Path) -> None:
        features = np.eye(5, dtype=np.float16)
        features[1, 2], features[3, 0] = np.nan, np.inf
        assert num_thumbnails(draw(tmp_path / "a.png", features)) == 3
        with pytest.raises(DataError, match="finite"):
            draw(tmp_path / "b.png", np.full((4, 2), np.nan))

    def test_names_at_most_twenty_classes(self, tmp_path: Path) -> None:
        heights = [
            draw(tmp_path / "a.png", blobs(count), np.arange(count)).shape[0] for count in (15, 21)
        ]
        assert heights[0] > heights[1]

    @pytest.mark.parametrize(
        "name", [r"$\frac{$", "_hidden", "<b>&", "\u732b", "", "a\nb", "x" * 99]
    )
    def test_a_class_may_have_any_name(self, tmp_path: Path, name: str) -> None:
        image = draw(tmp_path / "a.png", blobs(5), [0, 0, 1, 1, -1], class_names=[name])
        legend = image[1350:]
        assert (legend < 128).any()

    def test_is_the_same_every_time(self, tmp_path: Path) -> None:
        images = [draw(tmp_path / f"{n}.png", blobs(30)) for n in range(2)]
        assert (images[0] == images[1]).all()

    def test_shrinks_large_images(self, tmp_path: Path) -> None:
        small = draw(tmp_path / "a.png", blobs(5))
        large = draw(tmp_path / "b.png", blobs(5), side_px=300)
        assert large.shape == small.shape
        assert num_thumbnails(large) == num_thumbnails(small)
