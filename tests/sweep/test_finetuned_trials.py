"""Trials that are compared by what fine-tuning gives at their end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.cli import main
from raysl.track.run_folder import RunFolder, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "undrawn")]

SWEEP = """\
base: base.yaml
set: {evaluate.finetune.epochs: 1, evaluate.finetune.batch_size: 8, evaluate.seeds: [0]}
space:
  evaluate.finetune.label_fraction: {grid: [0.2, 0.4]}
  evaluate.finetune.head_layers: {grid: [1]}
metric: {name: final/finetune_top1, also: [eval/knn_top1]}
search: {name: grid}
budget: {steps: 2}
final: [knn, finetune]
track: {mlflow: false}
"""


def test_a_sweep_over_settings_of_fine_tuning_compares_by_its_accuracy(
    run_yaml: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_yaml("base")
    (tmp_path / "tuned.yaml").write_text(SWEEP)
    assert main(["sweep", "tuned.yaml", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results["trials"], results["finished"]) == (2, 2)
    tops: dict[int, float] = {}
    for number in range(2):
        folder = RunFolder(tmp_path / "runs" / "tuned" / "trials" / f"{number:04d}")
        found = folder.read_results()
        assert found is not None
        tops[number] = found["finetune_top1"]
        assert read_metrics(folder.metrics)[-1]["final/finetune_top1"] == tops[number]
        assert found["finetune_labels"] == (64 if number == 1 else 32)
        assert len(list(folder.protocols.iterdir())) == 1
    assert results["best_metric"] == max(tops.values())
    assert tops[results["best_trial"]] == max(tops.values())
