import re
from pathlib import Path
from typing import Any

import pytest

from raysl.downstream.pipeline_page import draw_accuracies, draw_pipeline

EVIL = "<script>alert(1)</script>\"'&"


def row(step: str, kind: str, top1: float | None, **more: Any) -> dict[str, Any]:
    learns = kind != "pretrain"
    return {
        "step": step,
        "kind": kind,
        "labels": 0.1 if learns else None,
        "num_labels": 5000 if learns else None,
        "head_layers": None,
        "teacher": None,
        "student": None,
        "backbone": "resnet18 0.5x",
        "top1": top1,
        "seconds": 60.0,
        "run_dir": f"runs/p/{step}",
        "mlflow_run_id": None,
    } | more


ROWS = [
    row("pretrain", "pretrain", 0.6),
    row("scratch-1percent", "scratch", 0.2, labels=0.01, num_labels=500),
    row("linear-10percent-layer0", "linear", 0.5, head_layers=0),
    row("finetune-1percent-layer1", "finetune", 0.4, labels=0.01, num_labels=500, head_layers=1),
    row("finetune-10percent-layer1", "finetune", 0.7, head_layers=1),
    row(
        "distill-10percent-small",
        "distill",
        0.725,
        teacher="finetune-10percent-layer1",
        student="small",
        backbone="resnet18 0.25x",
    ),
]


@pytest.fixture
def draw(tmp_path: Path) -> Any:
    """Draw a pipeline; return its page, and what could not be drawn."""

    def run(rows: list[dict[str, Any]], **more: Any) -> tuple[str, list[tuple[str, str]]]:
        given = {"name": "a-pipeline", "settings": "base: a.yaml"} | more
        failures = draw_pipeline(tmp_path, rows=rows, **given)
        page = tmp_path / "report.html"
        return page.read_text() if page.is_file() else "", failures

    return run


class TestDrawPipeline:
    def test_draws_the_picture_and_puts_it_into_the_page(self, draw: Any, tmp_path: Path) -> None:
        page, failures = draw(ROWS)
        assert failures == []
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["accuracy.png"]
        assert page.count("data:image/png;base64,") == 1

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("rows", [[], ROWS[:1], [row("finetune-1percent", "finetune", None)]])
    def test_one_that_has_only_begun_has_a_page_too(
        self, draw: Any, rows: list[dict[str, Any]]
    ) -> None:
        page, failures = draw(rows)
        assert failures == []
        assert "No step that learns from labels has finished yet." in page
        table = page[page.index("<table class=trials>") :]
        assert table[: table.index("</table>")].count("<th scope=row>") == len(rows)
        assert "<img" not in page
        assert "not drawn" not in page

    def test_a_picture_that_fails_does_not_lose_the_page(
        self, draw: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ValueError("no ink")

        monkeypatch.setattr("raysl.downstream.pipeline_page.draw_accuracies", fail)
        page, failures = draw(ROWS)
        assert failures == [("accuracy", "ValueError: no ink")]
        assert "not drawn (pictures/accuracy.png)" in page
        assert all(f"<code>{each['step']}</code>" in page for each in ROWS)

    def test_reports_a_page_that_cannot_be_written(self, draw: Any, tmp_path: Path) -> None:
        (tmp_path / "report.html").mkdir()
        assert [name for name, _ in draw(ROWS)[1]] == ["report"]


class TestPage:
    def test_opens_with_the_best_network(self, draw: Any) -> None:
        page, _ = draw(ROWS)
        assert (
            "Best of 5 networks: <code>distill-10percent-small</code>, with 72.5 % top-1 "
            "accuracy from 10 % of the labels." in page
        )

    def test_the_pretrainings_probe_is_not_among_the_best(self, draw: Any) -> None:
        page, _ = draw([row("pretrain", "pretrain", 0.99), *ROWS[1:]])
        assert "Best of 5 networks: <code>distill-10percent-small</code>" in page

    def test_has_a_row_for_every_step_in_their_order(self, draw: Any) -> None:
        page, _ = draw(ROWS)
        table = page[page.index("<table class=trials>") :]
        table = table[: table.index("</table>")]
        found = re.findall(r"<th scope=row><code>(.*?)</code>(.*)", table)
        assert [name for name, _ in found] == [each["step"] for each in ROWS]
        cells = {name: rest.split("<td>")[1:] for name, rest in found}
        dash = "&ndash;"
        assert cells["pretrain"][:6] == [dash, dash, dash, "resnet18 0.5x", "60.0", "60.0 s"]
        assert cells["finetune-1percent-layer1"][:3] == ["1 %", "1", dash]
        assert cells["linear-10percent-layer0"][1] == "0"  # not the same as no choice
        assert cells["distill-10percent-small"][2:5] == [
            "finetune-10percent-layer1",
            "resnet18 0.25x",
            "72.5",
        ]

    def test_holds_the_settings_and_the_files_that_are_there(
        self, draw: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "pipeline.yaml").touch()
        page, _ = draw(ROWS)
        assert "<pre>base: a.yaml</pre>" in page
        assert "every setting resolved" in page
        assert "mlflow.json" not in page

    def test_asks_the_network_for_nothing(self, draw: Any) -> None:
        page, _ = draw(ROWS)
        assert not re.search(r"""(src|href|url|action)\s*[=(]\s*['"]?\s*(https?:)?//""", page)
        assert "default-src 'none'" in page

    def test_escapes_names_that_are_code(self, draw: Any) -> None:
        evil = [row(EVIL, "finetune", 0.5, teacher=EVIL, backbone=EVIL, head_layers=1)]
        page, failures = draw(evil, name=EVIL, settings=EVIL)
        assert failures == []
        assert "<script" not in page


class TestPicture:
    @pytest.fixture
    def figure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Draw rows; return the figure as it was saved."""
        saved: list[Any] = []
        monkeypatch.setattr(
            "raysl.downstream.pipeline_page.save_png", lambda figure, path: saved.append(figure)
        )

        def run(rows: list[dict[str, Any]]) -> Any:
            draw_accuracies(tmp_path / "accuracy.png", rows)
            return saved[-1]

        return run

    def test_has_a_part_for_each_share_and_a_dot_for_each_network(self, figure: Any) -> None:
        parts = figure(ROWS).axes
        assert [part.get_title(loc="left") or part.get_title() for part in parts] == [
            "1 % of the labels (500)",
            "10 % of the labels (5,000)",
        ]
        dots = [
            [line.get_xdata()[0] for line in part.lines if line.get_marker() == "o"]
            for part in parts
        ]
        assert dots == [pytest.approx([40, 20]), pytest.approx([72.5, 70, 50])]  # from below
        names = [[text.get_text() for text in part.get_yticklabels()] for part in parts]
        assert names == [
            ["head layer 1", "random weights"],
            ["student small", "head layer 1", "linear, encoder alone"],
        ]

    @pytest.mark.filterwarnings("error")
    def test_an_accuracy_of_zero_still_has_a_picture(self, draw: Any) -> None:
        assert draw([row("scratch-1percent", "scratch", 0.0)])[1] == []

    def test_one_share_is_one_part(self, figure: Any) -> None:
        assert len(figure(ROWS[-2:]).axes) == 1
