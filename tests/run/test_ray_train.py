"""Training on Ray gives what training without Ray gives, whatever happens on the way."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.track.run_folder import RunFolder, list_waiting, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "undrawn")]

Processes = Callable[[str], list[Any]]

ON_RAY = ["cluster.num_train_workers=1"]
# The last two operations run in the train worker, the first in the data workers.
ON_DEVICE = [
    "data.views={recipe: custom, kinds: [{count: 2, size_px: 32, crop: {scale: [0.5, 1.0]}, "
    "ops: [{op: rotate}, {op: color_jitter, prob: 1.0}, {op: blur, prob: 0.5}]}]}",
    "data.color_on=device",
]


def values(metric: str, name: str) -> dict[int, float]:
    records = read_metrics(RunFolder(Path("runs") / name).metrics)
    return {int(r["step"]): r[metric] for r in records if metric in r}


def losses(name: str) -> dict[int, float]:
    return values("train/loss", name)


def pretrain(config: Path, *overrides: str) -> int:
    return main(["pretrain", str(config), *overrides])


class TestOneWorker:
    def test_gives_the_same_losses_to_the_bit_as_no_ray_and_leaves_the_same_files(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        full = ["evaluate.final=[knn,linear_lbfgs,finetune]", "evaluate.pixel_baseline=false"]
        full += ["evaluate.finetune={epochs: 1, batch_size: 8, label_fraction: 0.2}"]
        full += ["evaluate.seeds=[0]", *ON_DEVICE]
        assert pretrain(run_yaml("bare"), *full) == 0
        assert pretrain(run_yaml("ray"), *full, *ON_RAY, "--json") == 0
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert losses("ray") == losses("bare")
        assert len(losses("ray")) == 6
        for metric in ("eval/knn_top1", "eval/rankme", "eval/alignment"):  # measured elsewhere
            assert values(metric, "ray") == values(metric, "bare")
            assert set(values(metric, "ray")) == {3, 6}
        results = [RunFolder(Path("runs") / name).read_results() or {} for name in ("bare", "ray")]
        for key in ("knn_top1", "linear_lbfgs_top1", "finetune_top1", "finetune_labels"):
            assert results[0][key] == results[1][key]
        files = {p.name for p in Path("runs/ray").iterdir()}
        assert {p.name for p in Path("runs/bare").iterdir()} <= files
        assert printed["run_dir"] == str(Path("runs/ray").absolute())
        assert printed["seconds_to_first_step"] > 0

    def test_a_broken_image_ends_the_run_once_with_its_name(
        self,
        run_yaml: Callable[[str], Path],
        draw_images: Callable[..., Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = draw_images(tmp_path / "photos", range(63))
        (folder / "broken.png").write_bytes(b"<html>not found</html>")
        overrides = [f"data.source={folder}", "data.limit=64", "data.bad_images={policy: fail}"]
        assert pretrain(run_yaml("broken"), *overrides, *ON_RAY) == 1
        error = capsys.readouterr().err
        # Workers that had been started again would have ended as "failed more often than".
        told = f"DecodeError: {folder}/broken.png (22 bytes, begins with 3c68746d): a web page"
        assert told in error
        assert "ClusterError" not in error
        assert "Traceback" not in error


class TestTwoWorkers:
    def test_give_the_losses_of_one_worker_with_the_same_global_batch(
        self, run_yaml: Callable[[str], Path]
    ) -> None:
        # Steps so small that rounding stays rounding. At the usual ones this is a chaotic system:
        # the same batches with their rows in another order part by 0.1 after five steps, even in
        # float64. What a step does with its gradients is tests/distributed's affair.
        calm = ["method.temperature=1.0", "optim.base_lr=1e-4", "optim.warmup={steps: 0}"]
        calm += ["backbone={name: resnet18, batch_norm: sync}", "evaluate.every=null"]
        assert pretrain(run_yaml("one"), *calm) == 0
        assert pretrain(run_yaml("two"), *calm, "cluster.num_train_workers=2") == 0
        one, two = losses("one"), losses("two")
        assert two == pytest.approx(one, abs=1e-3)
        assert max(one.values()) - min(one.values()) > 0.02  # each step has images of its own
        norms = [values("train/grad_norm", name) for name in ("one", "two")]
        assert norms[1] == pytest.approx(norms[0], rel=0.05)


class TestAKilledWorker:
    # Ray Train replaces its workers; its controller we replace, and the workers end with it.
    @pytest.mark.parametrize("process", ["RayTrainWorker", "TrainController"])
    def test_the_run_goes_on_and_ends_as_if_nothing_had_happened(
        self, run_yaml: Callable[[str], Path], processes: Processes, process: str
    ) -> None:
        longer = ["train.steps=12", "train.checkpoint_every={steps: 5}"]
        # Slow enough to be shot before it is measured.
        longer += ["evaluate.every={steps: 4}", "backbone={name: resnet18}"]
        assert pretrain(run_yaml("calm"), *longer) == 0
        killed: list[list[int]] = []
        shot = (lambda: processes(process), "shot", 8, killed)
        killer = threading.Thread(target=kill_at, args=shot, daemon=True)
        killer.start()
        assert pretrain(run_yaml("shot"), *longer, *ON_RAY) == 0
        killer.join(timeout=5)
        assert killed, "nothing was killed, so nothing was tested"
        assert losses("shot") == losses("calm")
        # That of step 4, before the checkpoint, may have been made; that of step 8 waited.
        assert killed in ([[4, 8]], [[8]])
        assert values("eval/knn_top1", "shot") == values("eval/knn_top1", "calm")
        records = read_metrics(RunFolder(Path("runs/shot")).metrics)
        assert [r["step"] for r in records if "eval/rankme" in r] == [4, 8, 12]
        assert not RunFolder(Path("runs/shot")).to_evaluate.exists()
        deadline = time.monotonic() + 60
        while processes("_Measurer") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not processes("_Measurer")


def kill_at(
    targets: Callable[[], list[Any]], name: str, step: int, killed: list[list[int]]
) -> None:
    """SIGKILL the newest of some processes once a run is past a step; note what then waits."""
    folder = RunFolder(Path("runs") / name)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if any(r["step"] >= step for r in read_metrics(folder.metrics)):
            # One of an earlier test may not have ended yet.
            newest = max(targets(), key=lambda process: process.create_time())
            os.kill(newest.pid, signal.SIGKILL)
            killed.append(list_waiting(folder.to_evaluate))
            return
        time.sleep(0.05)
