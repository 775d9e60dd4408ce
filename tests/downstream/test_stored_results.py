"""Pipelines and evaluations in a store: the same results as on a disk, and nothing is repeated."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.downstream.evaluation import measure_unit
from raysl.downstream.evaluation_page import draw_evaluation
from raysl.errors import StoppedError
from raysl.evaluate.embedding import encoder_digest
from raysl.store.lease import LEASE
from raysl.store.objects import Store
from raysl.track.run_folder import RunFolder
from raysl.train import loop

PIPELINE = """\
base: base.yaml
pretrain: {method.projection_layers: 3, train.steps: 2}
set: {train.steps: 2, train.global_batch_size: 16, evaluate.every: null}
finetune: [{labels: [0.25], head_layers: [1]}]
distill: [{name: student}]
track: {mlflow: false}
"""
TUNED, STUDENT = "finetune-25percent-layer1", "distill-25percent-student"
TIMES = ("seconds", "images_per_s", "run_dir", "run", "encoder")


@pytest.fixture
def base(run_yaml: Callable[[str], Path], tmp_path: Path, undrawn: None) -> Path:
    (tmp_path / "p.yaml").write_text(PIPELINE)
    return run_yaml("base")


def fetched(store: Store, folder: Path) -> Path:
    for name in store.list():
        store.get_file(name, folder / name)
    return folder


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def test_a_pipeline_goes_on_elsewhere_with_its_unfinished_step(
    base: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["pipeline", "p.yaml", "output_dir=disk"]) == 0
    disk = tmp_path / "disk" / "p"
    command = ["pipeline", "p.yaml", f"output_dir={bucket}/runs"]
    ends = loop.Trainer._end_if

    def stop(self: loop.Trainer, stops: bool, steps_done: int) -> None:
        if type(self.method).__name__ == "Supervised" and steps_done == 1:
            raise StoppedError("after step 1")
        ends(self, stops, steps_done)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_end_if", stop)
        assert main(command) != 0
    store = Store(f"{bucket}/runs/p")
    assert json.loads(store.get("pipeline.json") or b"")["finished"] == 1
    pretrained = store.list("pretrain")
    monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "another machine"))
    assert main(command) == 0
    ours = {name for name in pretrained if name not in ("pretrain/config.yaml", LEASE)}
    assert {n: e for n, e in store.list("pretrain").items() if n in ours} == {
        name: pretrained[name] for name in ours
    }
    there = fetched(store, tmp_path / "fetched")
    results = [json.loads((each / "pipeline.json").read_text()) for each in (there, disk)]
    assert without_times(results[0]["steps"]) == without_times(results[1]["steps"])
    assert results[0]["pipeline_dir"] == store.address
    for step in ("pretrain", TUNED, STUDENT):
        pair = [RunFolder(each / step).encoder for each in (there, disk)]
        assert encoder_digest(pair[0]) == encoder_digest(pair[1])
    assert f"teacher: {store.address}/{TUNED}" in (there / STUDENT / "config.yaml").read_text()
    texts = [
        path.read_text() for path in there.rglob("*") if path.suffix in (".yaml", ".json", ".html")
    ]
    assert not [text for text in texts if "another machine" in text]
    assert not [name for name in store.list() if name.endswith(LEASE)]


def test_an_evaluation_goes_on_elsewhere_and_equals_that_on_a_disk(
    base: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysl.downstream.evaluation_page.draw_evaluation", draw_evaluation)
    protocols = ["--protocols", "knn,linear_lbfgs,finetune"]
    words = [
        "cluster.num_train_workers=0", "seeds=[0]", "track.mlflow=false", "finetune.epochs=1",
        "finetune.batch_size=16",
    ]  # fmt: skip
    for place in ("disk", f"{bucket}/runs"):
        assert main(["pretrain", str(base), "train.steps=2", f"output_dir={place}"]) == 0
    assert main(["evaluate", "disk/base", *words, *protocols]) == 0
    disk = tmp_path / "disk" / "base" / "evaluations" / "digits"
    command = ["evaluate", f"{bucket}/runs/base", *words, *protocols]
    measured: list[str] = []

    def dies(unit: Any, *given: Any, **more: Any) -> Any:
        measured.append(unit.protocol)
        if unit.protocol == "linear_lbfgs" and len(measured) == 2:
            time.sleep(0.1)
            raise KeyboardInterrupt
        return measure_unit(unit, *given, **more)

    monkeypatch.setattr("raysl.downstream.evaluation.measure_unit", dies)
    assert main(command) == 130
    store = Store(f"{bucket}/runs/base/evaluations/digits")
    assert "evaluation.npz" in store.list()
    monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "another machine"))
    assert main(command) == 0
    assert measured == ["knn", "linear_lbfgs", "linear_lbfgs"]
    there = fetched(store, tmp_path / "fetched")
    records = [json.loads((each / "evaluation.json").read_text()) for each in (there, disk)]
    label_free = [record.pop("label_free") for record in records]
    assert label_free[0] == pytest.approx(label_free[1], rel=1e-5)  # of other numbers of threads
    assert without_times(records[0]) == without_times(records[1])
    assert records[0]["encoder"] == f"{bucket}/runs/base/encoder.safetensors"
    (run,) = (there / "runs").iterdir()
    assert encoder_digest(run / "encoder.safetensors") == encoder_digest(
        next((disk / "runs").iterdir()) / "encoder.safetensors"
    )
    assert f"weights: {bucket}/runs/base/encoder.safetensors" in (run / "config.yaml").read_text()
    page = (there / "report.html").read_text()
    assert "another machine" not in page
    assert str(store.address) in page
