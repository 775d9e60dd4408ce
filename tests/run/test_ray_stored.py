"""A run on Ray whose workers do not see the driver's folder, only a store.

The store is a folder that nobody opens but through ``file://``: workers of the tests' Ray do not
have the credentials of a server that one test starts. Runs against S3 are in test_stored.py.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.cli import main
from raysl.errors import StoppedError
from raysl.evaluate.embedding import encoder_digest
from raysl.run.pretrain import train_run
from raysl.run.recipe import load_run
from raysl.store.scratch import scratch_base
from raysl.track.run_folder import RunFolder, list_checkpoints, read_metrics
from raysl.train import loop

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "undrawn")]


def curve(folder: RunFolder) -> list[tuple[int, str, float]]:
    names = ("train/loss", "eval/knn_top1", "eval/rankme", "final/knn_top1")
    return sorted(
        (record["step"], name, record[name])
        for record in read_metrics(folder.metrics)
        for name in names
        if name in record
    )


def test_a_run_that_stopped_without_ray_goes_on_there_to_the_same_bits(
    run_yaml: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_yaml("a")
    assert main(["pretrain", str(path), "output_dir=disk"]) == 0
    undisturbed = RunFolder(tmp_path / "disk" / "a")
    there = RunFolder(tmp_path / "store" / "a")
    place = {"output_dir": f"file://{there.path.parent}"}

    def stop(self: loop.Trainer, stops: bool, steps_done: int) -> None:
        if steps_done == 2:
            raise StoppedError("after step 2")

    here = load_run(path).model_copy(update=place)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_end_if", stop)
        with pytest.raises(KeyboardInterrupt):
            train_run(here, began_at=time.time())
    assert list_checkpoints(there.checkpoints) == [2]
    on_ray = load_run(path, ["cluster.num_train_workers=1"]).model_copy(update=place)
    results = train_run(on_ray, began_at=time.time())
    assert results["run_dir"] == f"{place['output_dir']}/a"  # type: ignore[typeddict-item]
    assert encoder_digest(there.encoder) == encoder_digest(undisturbed.encoder)
    assert curve(there) == curve(undisturbed)  # the evaluation of step 3 was measured elsewhere
    assert list_checkpoints(there.checkpoints)[-1] == 6
    assert there.results.exists()
    assert not there.to_evaluate.exists() or not any(there.to_evaluate.iterdir())
    assert not list(scratch_base().glob(f"*-{os.getpid()}-*"))
