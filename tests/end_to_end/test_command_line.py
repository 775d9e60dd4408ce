"""The command line as a person uses it: stop, go on, finish, make mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from raysl.cli import main
from raysl.encoder.file import load_encoder
from raysl.track.run_folder import RunFolder, list_checkpoints, read_metrics

PIPELINE = Path(__file__).parents[2] / "pipelines" / "pretrain.py"


def losses(name: str) -> dict[int, float]:
    records = read_metrics(RunFolder(Path("runs") / name).metrics)
    return {int(r["step"]): r["train/loss"] for r in records if "train/loss" in r}


class TestWhatARunLeaves:
    @pytest.mark.usefixtures("empty_store_here")
    def test_leaves_everything_that_the_documents_name(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["track.mlflow=true", "evaluate.final=[knn,linear_lbfgs,few_shot]", "--json"]
        assert main(["pretrain", str(run_yaml("all")), *words]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        folder = Path("runs/all")
        wanted = (
            "config.yaml metrics.jsonl checkpoints encoder.safetensors results.json report.html"
        )
        assert set(wanted.split()) <= {path.name for path in folder.iterdir()}
        assert {p.name for p in (folder / "pictures").iterdir()} >= {"curves.png", "map.png"}
        measures = ("knn_top1", "linear_lbfgs_top1", "few_shot_top1")
        prefixes = ("", "untrained_", "pixels_")
        assert all(0 < result[prefix + name] <= 1 for prefix in prefixes for name in measures)
        assert result["images_per_s"] > 0
        assert 0 <= result["data_wait"] <= 1
        assert result["mlflow_problem"] is None
        assert load_encoder(folder).training is False

    def test_images_without_labels_give_an_encoder_and_a_map(
        self,
        run_yaml: Callable[[str], Path],
        draw_images: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        photos = draw_images(tmp_path / "photos", range(40), size=(20, 30), suffix=".jpg")
        overrides = [f"data.source={photos}", "train.steps=1", "evaluate.final=full"]
        assert main(["pretrain", str(run_yaml("plain")), *overrides]) == 0
        assert Path("runs/plain/encoder.safetensors").exists()
        assert Path("runs/plain/pictures/map.png").exists()


@pytest.mark.usefixtures("undrawn")
class TestPretrain:
    def test_fine_tuning_at_the_end_is_in_the_results_and_leaves_the_encoder_alone(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        short = ["train.steps=2", "evaluate.every=null"]
        tune = ["evaluate.final=[finetune]", "evaluate.seeds=[0]"]
        tune.append("evaluate.finetune={label_fraction: 0.2, head_layers: 1, epochs: 2}")
        assert main(["pretrain", str(run_yaml("plain")), *short]) == 0
        assert main(["pretrain", str(run_yaml("tuned")), *short, *tune, "--json"]) == 0
        captured = capsys.readouterr()
        result = json.loads(captured.out.splitlines()[-1])
        plain, tuned = (RunFolder(Path("runs") / name) for name in ("plain", "tuned"))
        (labels,) = tuned.protocols.glob("finetune.1-*-seed0/labels.json")
        kept = json.loads(labels.read_text())
        # 160 training images, no fewer for the test, which has a split of its own.
        assert len(kept["rows"]) == len(set(kept["rows"])) == result["finetune_labels"] == 32
        assert (kept["source"], kept["seed"]) == ("digits/train", 0)
        assert 0 < result["finetune_top1"] <= 1
        assert read_metrics(tuned.metrics)[-1]["final/finetune_top1"] == result["finetune_top1"]
        states = [load_encoder(folder.encoder).state_dict() for folder in (plain, tuned)]
        assert all((states[0][key] == states[1][key]).all() for key in states[0])
        assert "finetune_top1" not in (plain.read_results() or {})
        assert not plain.protocols.exists()

    def test_fine_tuning_from_a_layer_that_is_not_there_is_refused_before_anything(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        tune = ["evaluate.final=[finetune]", "evaluate.finetune={head_layers: 3}"]
        assert main(["pretrain", str(run_yaml("no")), *tune]) == 1
        assert "evaluate.finetune.head_layers=3" in capsys.readouterr().err
        assert not Path("runs/no").exists()

    def test_stopped_after_five_steps_and_started_again_equals_ten_steps_to_the_bit(
        self, run_yaml: Callable[[str], Path]
    ) -> None:
        ten = ["train.steps=10", "train.checkpoint_every={steps: 5}", "evaluate.every=null"]
        ten += ["backbone={name: resnet18}"]  # slow enough to be killed on its way
        assert main(["pretrain", str(run_yaml("whole")), *ten]) == 0
        config = run_yaml("parted")
        process = subprocess.Popen([sys.executable, PIPELINE, config, *ten])
        try:
            wait_for((Path("runs/parted/checkpoints") / "step-000000005").exists)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert max(losses("parted")) < 10, "it finished before it was killed"
        assert main(["pretrain", str(config), *ten]) == 0
        assert losses("parted") == losses("whole")
        files = [Path("runs") / name / "encoder.safetensors" for name in ("whole", "parted")]
        ours, theirs = (load_encoder(path).state_dict() for path in files)
        assert all((ours[key] == theirs[key]).all() for key in ours)

    @pytest.mark.parametrize(
        ("workers", "number"),
        [(0, signal.SIGINT), pytest.param(1, signal.SIGTERM, marks=pytest.mark.ray)],
    )
    @pytest.mark.usefixtures("empty_store_here")
    def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
        self,
        run_yaml: Callable[[str], Path],
        workers: int,
        number: signal.Signals,
        tmp_path: Path,
    ) -> None:
        config = run_yaml("stopped")
        command = [sys.executable, PIPELINE, config, "train.steps=5000", "evaluate.every=null"]
        command += [f"cluster.num_train_workers={workers}", "train.checkpoint_every={steps: 4000}"]
        command += ["track={mlflow: true}"]
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            # What a shell starts in the background ignores Ctrl-C, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        try:
            wait_for(lambda: bool(losses("stopped")))
            process.send_signal(number)
            _, error = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 128 + number
        folder = RunFolder(Path("runs/stopped"))
        (step,) = list_checkpoints(folder.checkpoints)
        assert 1 <= step < 4000
        told = f"stopped after step {step} of 5000; the same command resumes from its last checkp"
        assert told in error.splitlines()[-1]
        assert "Traceback" not in error
        assert max(losses("stopped")) == step  # no step is wasted
        (run,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
        assert run.info.status == "KILLED"

    def test_two_processes_cannot_train_in_one_folder(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = run_yaml("shared")
        with RunFolder(Path("runs/shared")).locked():
            assert main(["pretrain", str(config)]) == 1
        assert f"process {os.getpid()} is training in this folder" in capsys.readouterr().err


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "answer"),
        [
            (["optim.base_lrr=1"], "optim: unknown key 'base_lrr'; did you mean 'base_lr'?"),
            (["train.global_batch_size=0"], "train.global_batch_size: Input should be greater"),
            (["method.name=simclrr"], "allowed: barlow, byol, "),
            (["data.source=/nowhere"], "data.source=/nowhere: no such file or folder"),
            (["train.global_batch_size=161"], "which has 160 images; use at most 160"),
            (["data.views={recipe: simclr, size_px: 0}"], "data.views.size_px"),
        ],
    )
    def test_are_answered_with_the_key_and_what_is_allowed(
        self,
        arguments: list[str],
        answer: str,
        run_yaml: Callable[[str], Path],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert main(["pretrain", str(run_yaml("wrong")), *arguments]) == 1
        error = capsys.readouterr().err
        assert answer in error
        assert "Traceback" not in error

    def test_a_missing_file_is_answered_with_the_nearest_name(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_yaml("quick")
        assert main(["pretrain", "quik.yaml"]) == 1
        assert "did you mean quick.yaml?" in capsys.readouterr().err

    def test_help_answers_without_loading_torch_or_ray(self) -> None:
        code = (
            "import sys, raysl.cli\n"
            "try:\n    raysl.cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
            "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), 'loaded too much'\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ray job submit --working-dir ." in done.stdout


class TestConfig:
    def test_prints_the_run_and_what_follows_from_it(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = str(run_yaml("shown"))
        assert main(["config", path, "optim.base_lr=0.4", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["config"]["optim"]["base_lr"] == 0.4
        assert shown["derived"]["peak_lr"] == pytest.approx(0.4 * 32 / 256)
        assert shown["derived"]["steps_per_epoch"] == 160 // 32
        assert main(["config", path]) == 0
        assert "peak_lr" in capsys.readouterr().out


def wait_for(condition: Callable[[], bool], *, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.05)
