"""`raysl benchmark plan`: a row and a point for each kind and number of images."""

import json
from pathlib import Path
from typing import Any

import cv2
import pytest

from raysl.benchmark.plan import PlanCost
from raysl.benchmark.plan_command import draw_plan_scale
from raysl.cli import main
from raysl.errors import DataError


def cost(kind: str, num_images: int, *, fits: bool = True) -> dict[str, Any]:
    if not fits:
        nothing: dict[str, Any] = dict.fromkeys(PlanCost._fields)
        return nothing | {"kind": kind, "num_images": num_images, "problem": "needs 9.0 GiB"}
    return PlanCost(kind, num_images, 2048, 1024, 0.01, 0.1, 0.5, 2.0, num_images)._asdict()


def test_prints_a_row_and_draws_a_point_for_each_kind_and_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "raysl.benchmark.plan_command.measure_in_own_process",
        lambda kind, count: cost(kind, count, fits=kind == "shards" or count < 10**9),
    )
    figure = tmp_path / "plan.png"
    command = ["benchmark", "plan", "--images", "1e3,1e9", "--figure", str(figure), "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    plans = json.loads(out.splitlines()[-1])["plans"]
    assert [(p["kind"], p["num_images"], p["problem"]) for p in plans] == [
        ("shards", 1000, None),
        ("shards", 10**9, None),
        ("folder", 1000, None),
        ("folder", 10**9, "needs 9.0 GiB"),
    ]
    for text in ("1e3", "2.0 KiB", "0.010 s", "2.00 ms", "953.7 MiB", "needs 9.0 GiB"):
        assert text in out
    assert "measuring the plan of 1,000,000,000 images in one group" in err
    assert figure.exists()


@pytest.mark.parametrize("value", ["0", "x", "1e3,-1", "1.5"])
def test_a_size_that_is_no_whole_number_above_zero_is_a_usage_error(value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "plan", f"--images={value}"])


class TestDrawPlanScale:
    def test_writes_a_picture_and_leaves_out_plans_that_did_not_fit(self, tmp_path: Path) -> None:
        plans = [cost("shards", 10**6), cost("shards", 10**9)]
        first, second = tmp_path / "first.png", tmp_path / "second.png"
        draw_plan_scale(first, plans)
        draw_plan_scale(second, [*plans, cost("folder", 10**9, fits=False)])
        assert cv2.imread(str(first)).shape[1] == 1320
        assert (cv2.imread(str(first)) == cv2.imread(str(second))).all()

    def test_without_a_plan_that_fitted_there_is_nothing_to_draw(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nothing to draw"):
            draw_plan_scale(tmp_path / "x.png", [cost("folder", 10**9, fits=False)])
