import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysl.benchmark.methods import (
    MethodRun,
    markdown_table,
    read_run,
    replace_section,
    train_in_own_process,
)
from raysl.benchmark.methods_picture import draw_gains, draw_loss_curves
from raysl.errors import DataError, RayslError

RESULTS = {
    "untrained_knn_top1": 0.35,
    "knn_top1": 0.5,
    "untrained_linear_lbfgs_top1": 0.4,
    "linear_lbfgs_top1": 0.61,
    "seconds": 90.0,
    "images_per_s": 320.0,
    "steps": 20,
}


def finished(folder: Path, **results: Any) -> Path:
    folder.mkdir()
    config = {
        "method": {"name": "simclr"},
        "backbone": {"name": "resnet18"},
        "train": {"global_batch_size": 64},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "results.json").write_text(json.dumps(RESULTS | results))
    lines: list[dict[str, Any]] = [{"step": step, "train/loss": 4.0 / step} for step in (1, 2, 4)]
    lines.append({"step": 4, "eval/knn_top1": 0.4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class TestReadRun:
    def test_reads_what_is_compared(self, tmp_path: Path) -> None:
        run = read_run(finished(tmp_path / "mine"))
        assert (run.name, run.method, run.backbone) == ("mine", "simclr", "resnet18")
        assert run.images_seen == 20 * 64
        assert run.knn_gain == pytest.approx(0.15)
        assert (run.steps, run.losses) == ((1, 2, 4), (4.0, 2.0, 1.0))

    def test_a_run_without_labels_cannot_be_compared(self, tmp_path: Path) -> None:
        folder = finished(tmp_path / "mine")
        (folder / "results.json").write_text(json.dumps({"steps": 20, "seconds": 3.0}))
        with pytest.raises(RayslError, match=r"mine: results.json lacks untrained_knn_top1, knn"):
            read_run(folder)


def run_named(tmp_path: Path, name: str, **results: Any) -> MethodRun:
    return read_run(finished(tmp_path / name, **results))


class TestMarkdown:
    def test_table_has_the_largest_gain_first(self, tmp_path: Path) -> None:
        runs = [run_named(tmp_path, "little", knn_top1=0.36), run_named(tmp_path, "much")]
        lines = markdown_table(runs).splitlines()
        assert lines[2] == (
            "| much | simclr | resnet18 | 1,280 | 1.5 | 4 to 1 | .350 | .500 | .400 | .610 |"
        )
        assert lines[3].startswith("| little |")
        assert {line.count("|") for line in lines} == {11}

    def test_a_section_is_replaced_and_the_rest_is_kept(self) -> None:
        text = replace_section("# Results\n\nWords.\n", name="methods", content="one")
        text += "\nMore words.\n"
        again = replace_section(text, name="methods", content="two\n")
        assert again == (
            "# Results\n\nWords.\n\n<!-- methods: begin -->\ntwo\n<!-- methods: end -->\n"
            "\nMore words.\n"
        )
        assert (
            replace_section("", name="a", content="b") == "<!-- a: begin -->\nb\n<!-- a: end -->\n"
        )


class TestPictures:
    def test_are_drawn_of_any_number_of_runs(self, tmp_path: Path) -> None:
        for count in (1, 4, 6):
            runs = [run_named(tmp_path, f"run{count}{i}") for i in range(count)]
            for draw in (draw_gains, draw_loss_curves):
                draw(tmp_path / "picture.png", runs)
                assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"

    def test_no_run_is_an_error(self, tmp_path: Path) -> None:
        for draw in (draw_gains, draw_loss_curves):
            with pytest.raises(DataError, match="nothing to draw"):
                draw(tmp_path / "picture.png", [])


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(RayslError, match=r"(?s)missing.yaml: the run failed:.*no such file"):
        train_in_own_process(tmp_path / "missing.yaml", [], on_line=said.append)
    assert any("missing.yaml" in line for line in said)
