from typing import Any

from rich.console import Console
from rich.table import Table

from raysl.commands.terminal import accuracy_table

RESULTS: dict[str, Any] = {
    "knn_top1": 0.9,
    "linear_top1": 0.95,
    "few_shot_top1": 0.7,
    "few_shot_top1_std": 0.03,
    "untrained_knn_top1": 0.5,
    "untrained_linear_top1": 0.55,
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

    def test_says_what_fine_tuning_gave(self) -> None:
        tuned = RESULTS | {"finetune_top1": 0.876, "finetune_labels": 1234}
        assert "fine-tuned on 1,234 labels: 87.6%" in text(accuracy_table(tuned))
        assert "fine-tuned" not in text(accuracy_table(RESULTS))
