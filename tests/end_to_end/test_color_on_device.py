"""A run whose colour operations run in the train worker is the run whose data workers do them.

On Ray it is the run without Ray, to the bit: tests/run/test_ray_train.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.cli import main
from raysl.track.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.usefixtures("undrawn")

VIEWS = (
    "data.views={recipe: custom, kinds: [{count: 2, size_px: 32, ops: [{op: rotate}, "
    "{op: color_jitter, prob: 1.0}, {op: blur, prob: 1.0}, {op: solarise, prob: 0.5}]}]}"
)
CALM = ["train.steps=3", "optim.base_lr=1e-4", "evaluate.every=null", "data.limit=64"]


def losses(name: str) -> list[float]:
    records = read_metrics(RunFolder(Path("runs") / name).metrics)
    return [r["train/loss"] for r in records if "train/loss" in r]


def test_it_has_nearly_the_same_losses(run_yaml: Callable[[str], Path]) -> None:
    settings = [VIEWS, *CALM]
    assert main(["pretrain", str(run_yaml("cpu")), *settings]) == 0
    assert main(["pretrain", str(run_yaml("device")), *settings, "data.color_on=device"]) == 0
    assert main(["pretrain", str(run_yaml("plain")), *CALM]) == 0
    assert losses("device") == pytest.approx(losses("cpu"), abs=0.02)
    assert losses("plain") != pytest.approx(losses("cpu"), abs=0.05)


def test_an_op_that_only_runs_on_the_cpu_at_the_end_is_refused_by_name(
    run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    views = "data.views={recipe: custom, kinds: [{count: 2, ops: [{op: blur}, {op: noise}]}]}"
    assert main(["pretrain", str(run_yaml("noise")), views, "data.color_on=device"]) == 1
    error = capsys.readouterr().err
    assert "'noise' only runs on the CPU; set color_on: cpu" in error
