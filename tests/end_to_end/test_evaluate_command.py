"""`raysl evaluate` as a person uses it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from raysl.cli import main
from raysl.downstream import evaluation
from raysl.downstream.evaluation_files import Evaluation, read_evaluation
from raysl.evaluate.probes import KnnConfig, ProbeResult, ProbeSets, measure_knn

HERE = "cluster.num_train_workers=0"
FAST = [
    "backbone.width=0.25",
    "features.size_px=16",
    "data.source=digits",
    "data.limit=203",
    "data.test_limit=101",
    HERE,
    "cluster.threads_per_train_worker=1",
]
LINEAR = ["linear.epochs=2", "linear.base_lrs=[0.1,1.0]"]
FEW_SHOT = "few_shot.draws=2"
NO_MLFLOW = "track.mlflow=false"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["evaluate", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def last_json(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text.splitlines()[-1])
    return values


def test_prints_writes_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Evaluation] = []

    def draw(folder: Path, *, encoder: Path, shown: str, **images: Any) -> list[tuple[str, str]]:
        assert shown == str(folder)
        assert encoder == tmp_path / "runs" / "untrained-resnet18-seed0" / "encoder.safetensors"
        drawn.append(read_evaluation(folder, **images))
        return [("map", "no room")]

    monkeypatch.setattr("raysl.downstream.evaluation_page.draw_evaluation", draw)
    status, text, _ = call(capsys, "resnet18", *FAST, *LINEAR, FEW_SHOT, NO_MLFLOW, "--json")
    assert status == 0
    found = last_json(text)
    assert list(found) == ["knn", "linear", "few_shot"]
    assert "knn@1 (k 20, temperature 0.07)" in text
    assert found["knn"]["seeds"] == []
    assert found["knn"]["deviation"] == 0
    assert found["linear"]["seeds"] == [0, 1, 2]
    assert found["linear"]["mean"] == pytest.approx(np.mean(found["linear"]["values"]))
    assert "changed: base_lrs=[0.1, 1.0], epochs=2" in found["linear"]["text"]
    assert all(v["seconds"] > 0 and v["images_per_s"] > 0 for v in found.values())
    folder = tmp_path / "runs" / "untrained-resnet18-seed0" / "evaluations" / "digits"
    assert set(drawn[0].predictions) == {"knn", "linear", "few_shot"}
    assert len(drawn[0].class_names) == 10
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["protocols"] == found
    assert (record["features"]["train"], record["features"]["test"]) == (203, 101)
    assert record["label_free"]["rankme"] > 1
    assert 0 < record["label_free"]["alignment"] < 4
    arrays = np.load(folder / "evaluation.npz")
    assert arrays["train_features"].shape == (203, 128)
    assert arrays["predictions_linear"].shape == arrays["test_labels"].shape == (101,)
    right = (arrays["predictions_linear"] == arrays["test_labels"]).mean()
    assert right == pytest.approx(found["linear"]["values"][0])
    names = ("train_features", "train_labels", "test_features", "test_labels")
    sets = ProbeSets(*(arrays[name] for name in names))
    assert measure_knn(KnnConfig(), sets, seed=0, device="cpu").top1 == found["knn"]["mean"]

    words = [*FAST, NO_MLFLOW, "--json", "--protocols", "knn,linear_lbfgs"]
    status, text, said = call(capsys, "resnet18", *words, "linear_lbfgs.inverse_penalties=[1.0]")
    assert status == 0
    assert "the features of 304 images are already computed" in said
    assert "1 of 2 measurements are already done" in said
    more = last_json(text)
    assert {name: more[name] for name in found} == found  # to the last digit, its seconds too
    assert more["linear_lbfgs"]["seeds"] == []
    assert "predictions_linear_lbfgs" in np.load(folder / "evaluation.npz").files

    status, _, said = call(capsys, "resnet18", *FAST, NO_MLFLOW, "features.crop_fraction=0.5")
    assert status == 1
    assert "contains another evaluation:\n  crop_fraction: 1.0 -> 0.5" in said


def test_goes_on_after_a_crash(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    undrawn: None,
) -> None:
    measured: list[tuple[str, int | None]] = []
    measure = evaluation.measure_unit

    def breaks(unit: evaluation.ProtocolRun, *words: Any, **more: Any) -> tuple[ProbeResult, float]:
        measured.append((unit.protocol, unit.seed))
        if measured[-1] == ("linear", 1) and measured.count(("linear", 1)) == 1:
            raise RuntimeError("out of memory")
        return measure(unit, *words, **more)

    monkeypatch.setattr(evaluation, "measure_unit", breaks)
    words = ["resnet18", *FAST, *LINEAR, NO_MLFLOW, "--protocols", "knn,linear", "--json"]
    with pytest.raises(RuntimeError):
        main(["evaluate", *words])
    folder = tmp_path / "runs" / "untrained-resnet18-seed0" / "evaluations" / "digits"
    assert list(json.loads((folder / "evaluation.json").read_text())["protocols"]) == ["knn"]
    capsys.readouterr()
    status, text, said = call(capsys, *words)
    assert status == 0, said
    assert "2 of 4 measurements are already done" in said
    assert measured[3:] == [("linear", 1), ("linear", 2)]
    assert len(last_json(text)["linear"]["values"]) == 3


def test_without_labels_gives_what_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{number}.png"), pixels)
    words = ["resnet18", "backbone.width=0.25", "data.source=photos", "features.size_px=16"]
    status, text, said = call(capsys, *words, HERE, NO_MLFLOW, "--json")
    assert status == 0
    assert "photos has no labels, so that no accuracy is measured" in said
    assert "only measures that need no labels are computed" in said
    assert list(last_json(text)) == ["label_free"]
    status, _, said = call(capsys, *words, HERE, NO_MLFLOW, "--protocols", "linear")
    assert status == 1
    assert "linear needs labels of two classes or more" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnet18", *FAST, "--protocols", "kn"], "'kn' is not known; allowed: knn, linear"),
        (["resnet81", "data.source=digits"], "no such run folder or encoder file, and no backbone"),
        (["resnet18"], "data.source: missing; name the images"),
        (["resnet18", "data.source=digits"], "features.size_px: resnet18 has random weights"),
        (
            ["resnet18", *FAST, "few_shot.labels_per_class=50", "--protocols", "few_shot"],
            "fewer than few_shot.labels_per_class=50",
        ),
        (["resnet18", *FAST, "--protocols", "semi_1"], "1 % of 203 labels is less than one for"),
        (
            ["resnet18", *FAST, "--protocols", "transfer"],
            "needs labelled images: set transfer.source",
        ),
        (
            ["resnet18", *FAST, "linear.epoch=3"],
            "linear: unknown key 'epoch'; did you mean 'epochs'",
        ),
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = call(capsys, *words)
    assert status == 1
    assert message in said
    assert "embedding" not in said


def test_test_images_of_other_classes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("3", "dog"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "photos" / place / "0.png"), np.zeros((8, 8, 3), np.uint8))
    status, _, said = call(capsys, "resnet18", *FAST, "data.test_source=photos")
    assert status == 1
    assert "data.test_source=" in said
    assert "not among the classes of digits" in said
    assert "dog" in said


def test_a_run_gets_the_numbers_in_its_own_mlflow_run(
    tmp_path: Path,
    run_yaml: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    undrawn: None,
    empty_store_here: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["track.mlflow=true", f"track.tracking_uri={uri}", "track.log_model=false"]
    assert main(["pretrain", str(run_yaml("mine")), *words, "evaluate.final=[knn]"]) == 0
    run_id = json.loads((tmp_path / "runs" / "mine" / "mlflow.json").read_text())["run_id"]
    own = ["data.test_limit=101", "--protocols", "knn,semi_10", HERE]
    training = ["semi_10.epochs=1", "semi_10.batch_size=8", "seeds=[0,1]", "--json"]
    down = "track.tracking_uri=http://127.0.0.1:9"
    kept = tmp_path / "runs" / "mine" / "mlflow.json"
    before = kept.read_text()
    kept.write_text(before.replace(uri, "http://127.0.0.1:9"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    status, text, said = call(capsys, "runs/mine", *own, *training, down)
    assert status == 0
    assert "MLflow did not accept everything" in said
    kept.write_text(before)
    status, again, _ = call(capsys, "runs/mine", *own, *training)
    assert status == 0
    found = last_json(again)
    assert found == last_json(text)
    metrics = MlflowClient(uri).get_run(run_id).data.metrics
    assert metrics["evaluate/digits/knn"] == found["knn"]["mean"]
    assert metrics["evaluate/digits/semi_10_deviation"] == found["semi_10"]["deviation"]
    for facts in found["semi_10"]["facts"]:
        assert facts["num_labels"] == 16
        assert len(json.loads((Path(facts["run"]) / "labels.json").read_text())["rows"]) == 16


def test_transfer_is_measured_on_images_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        place = tmp_path / "photos" / ("dark", "light")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + 150 * (number % 2)
        cv2.imwrite(str(place / f"{number}.png"), pixels)
    words = [*FAST, *LINEAR, NO_MLFLOW, "--json"]
    words += ["--protocols", "knn,transfer", "transfer.source=photos"]
    status, text, _ = call(capsys, "resnet18", *words)
    assert status == 0
    found = last_json(text)
    assert list(found) == ["knn", "transfer_knn", "transfer"]
    assert found["transfer"]["source"] == str(tmp_path / "photos")
    assert found["transfer"]["text"].startswith("linear@1")
    assert found["transfer_knn"]["mean"] == 1.0
    assert found["knn"]["mean"] < 1.0
    assert last_json(call(capsys, "resnet18", *words)[1]) == found


@pytest.mark.ray
def test_on_ray_gives_the_same(
    ray_cluster: None, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    here = last_json(call(capsys, "resnet18", *FAST, *LINEAR, FEW_SHOT, NO_MLFLOW, "--json")[1])
    words = [*(word for word in FAST if word != HERE), *LINEAR, FEW_SHOT, NO_MLFLOW, "--json"]
    words += ["--name", "ray"]
    status, text, said = call(capsys, "resnet18", *words)
    assert status == 0, said
    there = last_json(text)
    for name, values in here.items():
        assert there[name]["values"] == pytest.approx(values["values"], abs=0.02)
        assert there[name]["seeds"] == values["seeds"]


def test_a_protocol_gives_the_same_number_at_a_runs_end_and_afterwards(
    run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    names = ["knn", "linear", "linear_lbfgs", "few_shot", "semi_10"]
    probes = ["few_shot.labels_per_class=3", "linear={epochs: 3, base_lrs: [0.1, 1.0]}"]
    settings = ["seeds=[1,2]", *probes, "semi_10={epochs: 2, batch_size: 8}"]
    at_end = [f"evaluate.{text}" for text in settings]
    final = f"evaluate.final=[{','.join(names)}]"
    only = ["evaluate.untrained_baseline=false", "evaluate.pixel_baseline=false"]
    assert main(["pretrain", str(run_yaml("mine")), final, *only, *at_end, "--json"]) == 0
    results = last_json(capsys.readouterr().out)
    words = ["data.test_limit=100", "--protocols", ",".join(names), HERE, NO_MLFLOW, "--json"]
    status, text, _ = call(capsys, "runs/mine", *settings, *words)
    assert status == 0
    found = last_json(text)
    for name in names:
        assert results[f"{name}_top1"] == pytest.approx(found[name]["mean"], abs=1e-12), name
        assert results["protocols"][name] == found[name]["text"]
        if len(found[name]["values"]) > 1:
            assert results[f"{name}_top1_std"] == pytest.approx(found[name]["deviation"], abs=1e-12)
