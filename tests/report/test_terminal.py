from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from raysl.report.terminal import ProgressView, accuracy_table

RESULTS: dict[str, Any] = {
    "knn_top1": 0.9,
    "linear_lbfgs_top1": 0.95,
    "few_shot_top1": 0.7,
    "few_shot_top1_std": 0.03,
    "untrained_knn_top1": 0.5,
    "untrained_linear_lbfgs_top1": 0.55,
    "untrained_few_shot_top1": 0.4,
    "untrained_few_shot_top1_std": 0.02,
    "knn_k": 20,
    "few_shot_labels": 5,
    "few_shot_draws": 4,
}


def text(table: Table) -> str:
    console = Console(width=110)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


class TestAccuracyTable:
    def test_has_a_row_for_each_that_was_measured(self) -> None:
        shown = text(accuracy_table(RESULTS))
        first, second = (line for line in shown.splitlines() if "%" in line)
        assert all(part in first for part in ("pretrained", "90.0%", "95.0%", "70.0% +- 3.0"))
        assert all(part in second for part in ("before training", "50.0%", "55.0%", "+- 2.0"))
        assert "pixels" not in shown

    def test_has_no_column_of_few_labels_where_there_were_too_few(self) -> None:
        known = {name: value for name, value in RESULTS.items() if "few_shot" not in name}
        shown = text(accuracy_table(known))
        assert "labels per class" not in shown
        assert all(part in shown for part in ("90.0%", "95.0%", "50.0%", "55.0%"))

    def test_says_what_fine_tuning_gave(self) -> None:
        tuned = RESULTS | {"finetune_top1": 0.876, "finetune_labels": 1234}
        assert "fine-tuned on 1,234 labels: 87.6%" in text(accuracy_table(tuned))
        assert "fine-tuned" not in text(accuracy_table(RESULTS))


def test_a_protocol_has_a_column_where_it_measured() -> None:
    results: Any = {"linear_top1": 0.4, "linear_top1_std": 0.012, "untrained_linear_top1": 0.2}
    shown = text(accuracy_table(results))
    assert "linear probe, by SGD" in shown
    assert "40.0% +- 1.2" in shown
    assert "kNN" not in shown


class TestProgressView:
    def test_says_what_the_end_waits_for_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        view = ProgressView(total_steps=4, done=0)
        view.update([{"step": 2, "time": 0.0, "train/loss": 3.0}], num_evaluations=1)
        assert "1 evaluation running" in capsys.readouterr().err
        view.update([{"step": 4, "time": 0.0, "train/loss": 2.0}], num_evaluations=2)
        view.update([], num_evaluations=2)
        view.update([{"step": 2, "time": 0.0, "eval/knn_top1": 0.5}], num_evaluations=1)
        said = capsys.readouterr().err
        assert "step 4/4" in said
        assert said.count("waiting for 2 evaluations") == 1
        assert "step 2/4" not in said  # a late value does not take the run back
        view.close()
