"""A worker whose disk is full, or whose folder goes away: what is said, and what is left."""

import errno
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.encoder.file import load_encoder
from raysl.errors import HungError, RunFolderError
from raysl.run import checkpoints, local
from raysl.run.local import pretrain_here
from raysl.run.recipe import RunConfig, load_run
from raysl.run.worker import pretrain
from raysl.sources.open import open_source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, checkpoint_path, list_checkpoints, read_metrics
from raysl.train.checkpoint_writer import CheckpointWriter
from raysl.train.loop import Trainer

# Small enough that a run takes a fraction of a second.
TINY = [
    "backbone={name: resnet18, stem: small, width: 0.125}",
    "data.views.kinds.0.size_px=16",
    "data.limit=64",
    "evaluate={every: null, final: knn, max_train_images: 60, max_test_images: 40}",
]
AT_ONCE = "train.checkpoint_retry_s=0"
FOLDER = Path("runs/r")

Train = Callable[..., Results]
impatient = partial(CheckpointWriter, first_pause_s=0.01)
save = torch.save


@pytest.fixture
def train(run_yaml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Train:
    def start(*overrides: str, asked: Callable[[], bool] = lambda: False) -> Results:
        monkeypatch.setattr(
            local, "pretrain", lambda *given, **more: pretrain(*given, **{**more, "stops": asked})
        )
        config: RunConfig[Any] = load_run(run_yaml("r"), [*TINY, *overrides])
        folder = RunFolder(FOLDER)
        folder.path.mkdir(exist_ok=True, parents=True)
        source = open_source(config.data, data=config.data)
        return pretrain_here(config, folder=folder, source=source, num_cpus=1)

    return start


def losses() -> dict[int, float]:
    records = read_metrics(RunFolder(FOLDER).metrics)
    return {int(r["step"]): r["train/loss"] for r in records if "train/loss" in r}


class FullDisk:
    """Makes checkpoints fail after the first ones."""

    def __init__(self, *, after: int, failures: int = 99) -> None:
        self.after, self.failures = after, failures
        self.calls = 0

    def __call__(self, *given: Any) -> None:
        self.calls += 1
        if self.after < self.calls <= self.after + self.failures:
            given[1].write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*given)


class TestAFullDisk:
    def test_at_the_end_is_named_and_the_same_command_writes_the_networks(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, *_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        with monkeypatch.context() as patch:
            patch.setattr("raysl.run.build.save_encoder", full)
            text = r"encoder\.safetensors: cannot be written: No space left on device; free space"
            with pytest.raises(RunFolderError, match=text):
                train("train.steps=2")
        assert not RunFolder(FOLDER).encoder.exists()
        train("train.steps=2")
        assert RunFolder(FOLDER).encoder.exists()

    def test_ends_the_run_and_loses_nothing_that_was_written(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", FullDisk(after=1))
            with pytest.raises(RunFolderError, match="No space left on device") as caught:
                train(AT_ONCE)
        assert "Earlier checkpoints are untouched; free space or set output_dir" in str(
            caught.value
        )
        folder = RunFolder(FOLDER)
        assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000000002"]
        assert not folder.encoder.exists()
        train(AT_ONCE)
        assert sorted(losses()) == [1, 2, 3, 4, 5, 6]

    def test_that_has_room_again_in_time_costs_nothing(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = FullDisk(after=0, failures=3)
        monkeypatch.setattr(torch, "save", disk)
        monkeypatch.setattr(checkpoints, "CheckpointWriter", impatient)
        results = train("train.checkpoint_every={steps: 6}", "train.checkpoint_retry_s=20")
        assert results["steps"] == 6
        assert list_checkpoints(RunFolder(FOLDER).checkpoints) == [6]
        told = [str(event["text"]) for event in read_metrics(RunFolder(FOLDER).events)]
        assert "Training continues, and it is tried again for 20 s" in told[0]
        assert "the checkpoint of step 6 is written, after" in told[1]
        assert len(told) == 2

    def test_ends_a_run_that_it_lets_go_on_with_how_long_was_tried(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch, "save", FullDisk(after=1))
        monkeypatch.setattr(checkpoints, "CheckpointWriter", impatient)
        with pytest.raises(RunFolderError, match=r"tried for 0\.3 s \(train\.checkpoint_retry_s\)"):
            train("train.checkpoint_retry_s=0.3", "train.checkpoint_every={steps: 1}")
        assert list_checkpoints(RunFolder(FOLDER).checkpoints) == [1]


def at_step(step: int, harm: Callable[[], None]) -> Callable[[], bool]:
    """Do harm before a step ends; the training asks after each one whether to stop."""
    asked: list[int] = []

    def stops() -> bool:
        asked.append(len(asked) + 1)
        if asked[-1] == step:
            harm()
        return False

    return stops


def delete() -> None:
    shutil.rmtree(FOLDER)


def replace() -> None:
    FOLDER.rename("elsewhere")
    shutil.copytree("elsewhere", FOLDER)
    (FOLDER / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "train/loss": 9.0}\n')


def rename() -> None:
    FOLDER.rename("elsewhere")


@pytest.mark.parametrize("harm", [delete, replace, rename])
class TestAFolderThatGoesAway:
    @pytest.mark.parametrize("every", [1, 100])
    def test_is_noticed_at_the_next_logging_step(
        self, train: Train, harm: Callable[[], None], every: int
    ) -> None:
        with pytest.raises(RunFolderError) as caught:
            train(
                *(f"train.log_every={every}", "train.checkpoint_every={steps: 4}"),
                asked=at_step(3, harm),
            )
        assert str(caught.value).startswith(
            f"{FOLDER.absolute()}: the run folder was deleted, renamed or replaced while the run"
        )
        assert FOLDER.exists() == (harm is replace)  # nothing is written into a new one

    def test_after_the_last_step_is_noticed_too(
        self, train: Train, monkeypatch: pytest.MonkeyPatch, harm: Callable[[], None]
    ) -> None:
        monkeypatch.setattr("raysl.run.worker._Worker.results", lambda _: harm() or {})
        with pytest.raises(RunFolderError, match="the run folder was deleted, renamed or replaced"):
            train()


class TestAKillDuringAWrite:
    def test_leaves_the_checkpoint_before_from_which_the_run_goes_on_to_the_bit(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a killed process leaves: half a state under a temporary name, and later metrics."""
        train()
        whole = losses()
        shutil.rmtree(FOLDER)

        class Killed(BaseException):
            pass

        writing = threading.Event()

        def never_ends(state: Any, file: Any) -> None:
            file.write(b"half")
            writing.set()
            time.sleep(20)

        def kill() -> None:
            assert writing.wait(10)
            raise Killed

        calls: list[int] = []

        def first_then_half(*given: Any) -> None:
            calls.append(1)
            (save if len(calls) == 1 else never_ends)(*given)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", first_then_half)
            with pytest.raises(Killed):
                train("train.checkpoint_every={steps: 2}", asked=at_step(6, kill))
        folder = RunFolder(FOLDER)
        assert any(path.name.startswith(".tmp-") for path in folder.checkpoints.iterdir())
        assert list_checkpoints(folder.checkpoints) == [2]
        train()
        assert losses() == whole


def test_the_state_that_is_written_is_that_of_its_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the weights have moved on by the time that the disk takes them."""
    train("train.checkpoint_every={steps: 2}", "train.keep_checkpoints=9")
    want = [(FOLDER / "checkpoints" / f"step-{n:09d}" / "state.pt").read_bytes() for n in (2, 4, 6)]
    shutil.rmtree(FOLDER)

    def slow(*given: Any) -> None:
        time.sleep(0.2)  # several steps
        save(*given)

    monkeypatch.setattr(torch, "save", slow)
    train("train.checkpoint_every={steps: 2}", "train.keep_checkpoints=9")
    got = [(FOLDER / "checkpoints" / f"step-{n:09d}" / "state.pt").read_bytes() for n in (2, 4, 6)]
    assert got == want


class TestKeptCheckpoints:
    def test_are_the_best_and_the_newest_each_with_an_encoder_that_loads(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accuracies = iter([0.3, 0.9, 0.5, 0.7])
        monkeypatch.setattr(
            "raysl.run.measuring.online_metrics", lambda *_: {"eval/knn_top1": next(accuracies)}
        )
        train(
            *("train.steps=8", "train.checkpoint_every={steps: 2}", "train.keep_checkpoints=1"),
            *("evaluate.every={steps: 2}", "train.keep_best={metric: eval/knn_top1}"),
        )
        folder = RunFolder(FOLDER)
        assert list_checkpoints(folder.checkpoints) == [4, 8]
        final = load_encoder(FOLDER).state_dict()
        for step, is_final in ((8, True), (4, False)):
            path = checkpoint_path(folder.checkpoints, step) / "encoder.safetensors"
            kept = load_encoder(path).state_dict()
            assert all(torch.equal(final[name], kept[name]) for name in final) == is_final

    def test_have_no_encoder_where_only_the_newest_are_kept(self, train: Train) -> None:
        train("train.steps=2")
        folder = checkpoint_path(RunFolder(FOLDER).checkpoints, 2)
        assert [path.name for path in folder.iterdir()] == ["state.pt"]

    def test_with_an_encoder_are_whole_after_a_second_attempt(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch, "save", FullDisk(after=0, failures=1))
        monkeypatch.setattr(checkpoints, "CheckpointWriter", impatient)
        train("train.steps=2", "train.keep_every={steps: 2}")
        folder = checkpoint_path(RunFolder(FOLDER).checkpoints, 2)
        assert sorted(path.name for path in folder.iterdir()) == ["encoder.safetensors", "state.pt"]


class TestAStepThatHangs:
    def test_ends_the_run_with_its_place_and_the_run_resumes(
        self, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step, done = Trainer._step, []

        def hang(self: Trainer, *given: Any) -> Any:
            done.append(1)
            if len(done) == 4:
                time.sleep(30)
            return step(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", hang)
            with pytest.raises(HungError, match="the train worker hangs: no progress") as caught:
                train("health.max_step_s=0.5", "train.checkpoint_every={steps: 2}")
        assert "worker 0: step 4, training, at " in str(caught.value)
        folder = RunFolder(FOLDER)
        assert "in hang" in (folder.stacks / "rank0.txt").read_text()
        assert list_checkpoints(folder.checkpoints) == [2]
        results = train("train.checkpoint_every={steps: 2}")
        told = [str(event["text"]) for event in read_metrics(folder.events)]
        assert told[1:] == ["resumes after step 2; step 3 is done again"]
        assert results["repeated_steps"] == 1
