"""What is printed at a run's end: its speed, its accuracy, its files and the next command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.run.recipe import load_run
from raysl.run.results import Run, print_results, speed
from raysl.run.shell import Typed
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder

Say = Callable[..., tuple[str, str]]
FULL: Results = {"linear_top1": 0.5, "knn_top1": 0.4, "untrained_linear_top1": 0.1}


@pytest.fixture
def said(run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> Say:
    """Say the results of run r; return standard output and standard error."""

    def say(results: Results, *overrides: str, typed: bool = True) -> tuple[str, str]:
        path = run_yaml("r")
        folder = RunFolder(Path("runs/r"))
        folder.path.mkdir(parents=True, exist_ok=True)
        asked = Typed(path, overrides) if typed else None
        print_results(Run(load_run(path, overrides), folder, Path(), asked, {}, 0.0), results)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return say


class TestSpeed:
    def test_is_weighted_by_time_and_leaves_out_records_without_one(self) -> None:
        records: list[dict[str, Any]] = [
            {"time/train_s": 1.0, "train/images_per_s": 100.0, "data/wait_share": 0.5},
            {"time/train_s": 3.0, "train/images_per_s": 200.0, "data/wait_share": 0.1},
            {"eval/knn_top1": 0.5},
        ]
        results = speed(records, 0.0)
        assert results["images_per_s"] == pytest.approx(175.0)
        assert results["data_wait"] == pytest.approx(0.2)
        assert "seconds_to_first_step" not in results

    def test_the_first_step_is_that_of_this_start(self) -> None:
        records = [{"time/first_step_at": at} for at in (50.0, 107.0)]
        assert speed(records, 100.0)["seconds_to_first_step"] == 7.0

    def test_a_start_that_trained_nothing_has_none(self) -> None:
        results = speed([{"time/first_step_at": 50.0}], 100.0)
        assert (results["images_per_s"], results["data_wait"]) == (0.0, 0.0)
        assert "seconds_to_first_step" not in results


class TestNext:
    def test_of_a_typed_run_is_a_longer_one(self, said: Say) -> None:
        out, _ = said({"knn_top1": 0.5}, "name=r")
        assert "next      raysl pretrain" in out
        assert out.rstrip().splitlines()[-2].endswith("name=r-12steps train.steps=12")

    @pytest.mark.parametrize(
        ("results", "line"),
        [
            ({"knn_top1": 0.5}, "next      raysl finetune {} data.labels.fraction=0.1"),
            ({}, "next      raysl evaluate {}"),
        ],
    )
    def test_of_another_run_depends_on_labels(self, said: Say, results: Results, line: str) -> None:
        out, _ = said(results, typed=False)
        assert line.format(Path("runs/r").absolute()) in out
        assert "photos " not in out

    def test_of_a_classifier_is_a_student(self, said: Say) -> None:
        classifier = ["method={name: supervised}", "data.views={recipe: finetune, size_px: 32}"]
        results: Results = {"top1": 0.7, "num_test_labels": 100, "num_classes": 10}
        out, _ = said(results | {"num_labels": 160}, *classifier)
        assert f"next      raysl distill {Path('runs/r').absolute()}" in out
        assert "model     " in out

    def test_built_in_images_lead_to_ones_own(self, said: Say) -> None:
        out, _ = said({})
        assert out.rstrip().splitlines()[-1] == (
            "photos    raysl pretrain simclr_resnet18_photos data.source=FOLDER_OF_IMAGES name=mine"
        )


def test_mlflow_is_named_only_where_it_is_used(said: Say) -> None:
    assert "compare   " not in said({})[0]
    assert "compare   " in said({}, "track.mlflow=true")[0]


def test_bad_images_and_failed_evaluations_are_told_with_their_lists(said: Say) -> None:
    assert said({"num_bad_images": 0})[1] == ""
    folder = RunFolder(Path("runs/r"))
    lines = [{"step": step, "problem": f"problem {step}"} for step in (2, 4)]
    folder.failed_evaluations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, err = said({"num_bad_images": 1200})
    err = err.replace("\n", " ")
    assert f"1,200 bad images, listed in {folder.bad_images}" in err
    assert "2 evaluation(s) during training failed or were skipped" in err
    assert "step 4: problem 4" in err
