"""Trials that Ray loses are run again, as often as a trial may be retried, and then reported."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import SweepError
from raysl.folder.whole import write_json
from raysl.sweep import command as verb
from raysl.sweep import start as start_module
from raysl.sweep.ray_shares import Shares
from raysl.track.run_folder import MetricsFile

BASE = """\
data: {source: digits, limit: 64}
method: {name: simclr}
train: {epochs: 2, global_batch_size: 32}
"""
SWEEP = """\
base: base.yaml
space: {method.temperature: {grid: [0.1, 0.2, 0.5]}}
search: {name: grid}
track: {mlflow: false}
retries: 1
"""
WHY = "Ray Tune gave it up: no process was ready"


class Ray:
    """Stands for Ray: finishes what it is given, but loses trial 1 some times."""

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.given: list[list[int]] = []

    def sweep(self, sweep: Any, suggestions: Any, watcher: Any, **more: Any) -> Mapping[int, str]:
        lost: dict[int, str] = {}
        self.given.append([])
        while (found := suggestions.next()) is not None:
            number = found[0]
            self.given[-1].append(number)
            if number == 1 and len(self.given) <= self.losses:
                lost[number] = WHY
                continue
            watcher.started(number)
            folder = more["folder"].trial(number)
            metrics = MetricsFile(folder.metrics, start_step=0)
            metrics.log({"eval/knn_top1": 0.5 + 0.1 * number, "train/epoch": 2.0}, step=4)
            metrics.close()
            write_json(folder.results, {})
            watcher.ended(number, error=None)
        return lost


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    monkeypatch.setattr(start_module, "connect", lambda: False)
    monkeypatch.setattr(
        start_module, "plan_shares", lambda *_, **__: Shares(1, 1.0, 0.0, False, "")
    )

    def start(ray: Ray, *overrides: str) -> int:
        monkeypatch.setattr(start_module, "sweep_on_ray", ray.sweep)
        return verb.run(
            argparse.Namespace(
                config=Path("sweep.yaml"), overrides=list(overrides), json=True, dry_run=False
            )
        )

    return start


def test_what_is_lost_once_is_run_again(run: Any) -> None:
    ray = Ray(losses=1)
    assert run(ray) == 0
    assert ray.given == [[0, 1, 2], [1]]


def test_what_is_lost_again_is_reported_and_the_same_command_goes_on_with_it(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = Ray(losses=9)
    with pytest.raises(SweepError, match=r"trials were lost: 0001 \(Ray Tune gave it up: no proc"):
        run(ray)
    assert ray.given == [[0, 1, 2], [1]]
    said = capsys.readouterr()
    assert '"finished": 2, "failed": 0' in said.out.splitlines()[-1]
    assert "budget.hours" not in said.err

    again = Ray(losses=0)
    assert run(again) == 0
    assert again.given == [[1]]
