"""The figure of `raysl benchmark plan`."""

from pathlib import Path
from typing import Any

import cv2
import pytest

from raysl.benchmark.plan_picture import draw_plan_scale
from raysl.errors import DataError


def plan(kind: str, num_images: int, peak: int | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "num_images": num_images,
        "peak_bytes": peak,
        "build_s": None if peak is None else 0.01,
        "first_item_s": None if peak is None else 0.1,
    }


class TestDrawPlanScale:
    def test_writes_a_picture_and_leaves_out_what_did_not_fit(self, tmp_path: Path) -> None:
        plans = [plan("shards", 10**6, 10**6), plan("shards", 10**9, 10**8)]
        fits, not_all = tmp_path / "fits.png", tmp_path / "not.png"
        draw_plan_scale(fits, plans)
        draw_plan_scale(not_all, [*plans, plan("folder", 10**9, None)])
        assert cv2.imread(str(fits)).shape[1] == 1320
        assert (cv2.imread(str(fits)) == cv2.imread(str(not_all))).all()

    def test_nothing_to_draw_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nothing to draw"):
            draw_plan_scale(tmp_path / "x.png", [plan("folder", 10**9, None)])
