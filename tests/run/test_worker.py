"""One worker from its start, or from a checkpoint, to the written encoder."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.encoder.file import load_encoder
from raysl.errors import DivergedError
from raysl.run.local import pretrain_here
from raysl.run.recipe import RunConfig, load_run
from raysl.sources.open import open_source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, checkpoint_path, list_checkpoints, read_metrics
from raysl.train.checkpoint import load_checkpoint

# Small enough that a run takes a fraction of a second.
TINY = [
    "backbone={name: resnet18, stem: small, width: 0.125}",
    "data.views.kinds.0.size_px=16",
    "data.limit=64",
    "evaluate={every: null, final: knn, max_train_images: 60, max_test_images: 40}",
]
MOCO = "method={name: moco, queue_length: 50, ema_momentum: 0.9}"
SPLIT = (
    "backbone={name: resnet18, stem: small, width: 0.125, batch_norm: split, batch_norm_splits: 4}"
)

Configure = Callable[..., RunConfig[Any]]


@pytest.fixture
def configure(run_yaml: Callable[[str], Path]) -> Configure:
    return lambda *overrides: load_run(run_yaml("r"), [*TINY, *overrides])


def run(config: RunConfig[Any], name: str, **more: Any) -> Results:
    folder = RunFolder(Path(name))
    folder.path.mkdir(exist_ok=True)
    source = open_source(config.data, data=config.data)
    return pretrain_here(config, folder=folder, source=source, num_cpus=1, **more)


def losses(name: str) -> dict[int, float]:
    records = read_metrics(RunFolder(Path(name)).metrics)
    return {int(r["step"]): r["train/loss"] for r in records if "train/loss" in r}


def forget_last_checkpoint(name: str) -> None:
    """Leave a folder as a kill after the last but one checkpoint does."""
    folder = RunFolder(Path(name)).checkpoints
    shutil.rmtree(checkpoint_path(folder, list_checkpoints(folder)[-1]))


@pytest.mark.parametrize("method", [[], [MOCO, SPLIT]], ids=["simclr", "moco"])
def test_from_a_checkpoint_it_ends_as_if_it_had_not_stopped(
    configure: Configure, method: list[str]
) -> None:
    """MoCo keeps a queue and an average of the weights, both optimizers a momentum."""
    config = configure("train.steps=4", *method)
    run(config, "whole")
    shutil.copytree("whole", "parted")
    forget_last_checkpoint("parted")
    run(config, "parted")
    assert losses("parted") == losses("whole")
    assert sorted(losses("whole")) == [1, 2, 3, 4]
    ours, theirs = (load_encoder(Path(name)).state_dict() for name in ("parted", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_after_the_last_step_only_what_follows_training_is_done_again(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("train.steps=2")
    first = run(config, "r")
    folder = RunFolder(Path("r"))
    folder.results.unlink()
    folder.encoder.unlink()
    monkeypatch.setattr("raysl.run.local._batches", lambda *_, **__: pytest.fail("no batches"))
    assert run(config, "r") == first
    assert folder.encoder.exists()
    assert folder.read_results() == first


def test_each_evaluation_is_passed_on_after_its_checkpoint_and_may_end_the_run(
    configure: Configure,
) -> None:
    class Stop(BaseException):
        pass

    told: list[tuple[int, list[int]]] = []

    def evaluated(metrics: Mapping[str, float], step: int) -> None:
        assert 0 <= metrics["eval/knn_top1"] <= 1
        told.append((step, list_checkpoints(RunFolder(Path("r")).checkpoints)))
        if step == 4:
            raise Stop

    config = configure("train.steps=6", "evaluate.every={steps: 2}")
    with pytest.raises(Stop):
        run(config, "r", evaluated=evaluated)
    assert [(step, kept[-1]) for step, kept in told] == [(2, 2), (4, 4)]
    assert RunFolder(Path("r")).read_results() is None


def test_a_loss_that_is_not_finite_ends_it_and_names_the_setting(configure: Configure) -> None:
    with pytest.raises(DivergedError, match=r"Lower optim\.base_lr"):
        run(configure("optim.base_lr=1e30", "train.checkpoint_every={steps: 1}"), "r")
    folder = RunFolder(Path("r"))
    assert not folder.encoder.exists()
    step = list_checkpoints(folder.checkpoints)[-1]
    state = load_checkpoint(folder.checkpoints, step=step, device=torch.device("cpu"))
    assert all(value.isfinite().all() for value in state["method"].values())


def test_the_last_record_of_the_metrics_has_what_the_results_have(configure: Configure) -> None:
    results = run(configure("train.steps=2"), "r")
    folder = RunFolder(Path("r"))
    last = read_metrics(folder.metrics)[-1]
    assert (last["step"], last["final/knn_top1"]) == (2, results["knn_top1"])
    assert (results["steps"], results["num_bad_images"]) == (2, 0)
    assert results["num_failed_evaluations"] == 0


def test_threads_are_the_configurations_or_all_that_are_given(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []
    monkeypatch.setattr(
        "raysl.run.local.pretrain", lambda *_, place, **__: places.append(place.threads) or {}
    )
    run(configure("cluster.threads_per_train_worker=3"), "r")
    run(configure("cluster.threads_per_train_worker=null"), "r")
    assert places == [3, 1]
