"""`--extend`: a run that goes on to a larger length from its last checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.cli import main
from raysl.data.stream import ItemMaker
from raysl.encoder.file import load_encoder
from raysl.optim.build import lr_at, peak_lr
from raysl.run.extension import records_of
from raysl.run.recipe import load_run
from raysl.track.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.usefixtures("undrawn")

Run = Callable[..., int]
SHORT = [
    "train.steps=4",
    "evaluate.every=null",
    "backbone={name: resnet18, stem: small, width: 0.125}",
    "data.views.kinds.0.size_px=16",
]
PER_EPOCH = 5  # 160 images in batches of 32


@pytest.fixture
def run(run_yaml: Callable[[str], Path]) -> Run:
    """Run `raysl pretrain NAME.yaml` with short settings, and others."""

    def pretrain(name: str, *words: str) -> int:
        return main(["pretrain", str(run_yaml(name)), *SHORT, *words])

    return pretrain


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, tuple[int, ...]]]:
    """Record the step, the epoch and the images of each work item that is made."""
    items: list[tuple[int, int, tuple[int, ...]]] = []
    make = ItemMaker.__call__

    def spy(self: ItemMaker, position: int) -> Any:
        item = self.plan.item(position)
        items.append((item.step, item.epoch, tuple(np.asarray(item.indices).tolist())))
        return make(self, position)

    monkeypatch.setattr(ItemMaker, "__call__", spy)
    return items


def logged(name: str, key: str = "train/loss") -> dict[int, float]:
    records = read_metrics(RunFolder(Path("runs") / name).metrics)
    return {int(r["step"]): r[key] for r in records if key in r}


def weights(name: str) -> dict[str, Any]:
    return dict(load_encoder(Path("runs") / name).state_dict())


def test_with_a_constant_rate_it_equals_a_run_of_the_full_length_to_the_bit(run: Run) -> None:
    constant = "optim.schedule=constant"
    assert run("whole", constant, "train.steps=8") == 0
    assert run("parted", constant) == 0
    assert run("parted", constant, "train.steps=8", "--extend") == 0
    assert logged("parted") == logged("whole")
    assert sorted(logged("parted")) == list(range(1, 9))
    ours, theirs = weights("parted"), weights("whole")
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_the_images_go_on_in_the_order_of_the_longer_run_and_none_comes_twice(
    run: Run, made: list[tuple[int, int, tuple[int, ...]]]
) -> None:
    assert run("whole", "train.steps=8") == 0
    whole, made[:] = sorted(made), []
    assert run("parted") == 0
    assert run("parted", "train.steps=8", "--extend") == 0
    assert sorted(made) == whole
    first = [row for step, _, rows in made if step < PER_EPOCH for row in rows]
    assert sorted(first) == list(range(160))  # an epoch that the extension begins within


def test_the_cosine_is_that_of_the_new_length_from_there_on_and_it_is_said_and_kept(
    run: Run, capsys: pytest.CaptureFixture[str], run_yaml: Callable[[str], Path]
) -> None:
    assert run("r") == 0
    before, results = logged("r", "train/lr"), RunFolder(Path("runs/r")).read_results()
    assert run("r", "train.steps=8", "--extend", "--json") == 0
    captured = capsys.readouterr()
    config = load_run(run_yaml("r"), SHORT)
    peak = peak_lr(config.optim, global_batch_size=32)

    def rate(step: int, total: int) -> float:
        return lr_at(config.optim, step, peak=peak, steps_per_epoch=PER_EPOCH, total_steps=total)

    after = logged("r", "train/lr")
    assert {step: after[step] for step in before} == before  # what is done stays as it was
    assert before == pytest.approx({step: rate(step - 1, 4) for step in range(1, 5)})
    assert {s: after[s] for s in range(5, 9)} == pytest.approx(
        {step: rate(step - 1, 8) for step in range(5, 9)}
    )
    told = f"extended after step 4 from 4 to 8 steps (train.steps=8); learning rate {before[4]:.4g}"
    assert f"{told} before, {after[5]:.4g} from there on" in captured.err
    assert "the learning rate's cosine" in captured.err
    (record,) = records_of(RunFolder(Path("runs/r")))
    assert (record["after_step"], record["total_steps"], record["results"]) == (4, [4, 8], results)
    assert record["learning_rate"] == pytest.approx([rate(3, 4), rate(4, 8)])
    assert json.loads(captured.out.splitlines()[-1])["steps"] == 8


def test_again_it_is_finished_and_once_more_it_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("r") == 0
    for _ in range(2):
        assert run("r", "train.steps=6", "--extend") == 0
    assert (
        "this run is finished; --extend with a larger train.epochs or train.steps"
        in capsys.readouterr().err
    )
    assert run("r", "train.steps=7", "--extend") == 0
    totals = [record["total_steps"] for record in records_of(RunFolder(Path("runs/r")))]
    assert totals == [[4, 6], [6, 7]]
    assert sorted(logged("r")) == list(range(1, 8))


def test_stopped_on_the_way_the_same_command_goes_on_with_or_without_the_word(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysl.train.loop import Trainer

    assert run("whole") == 0
    assert run("whole", "train.steps=8", "--extend") == 0
    assert run("parted") == 0
    step = Trainer._step

    def stop(self: Trainer, batch: Any, progress: Any) -> Any:
        if progress.step == 7:
            raise KeyboardInterrupt
        return step(self, batch, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop)
        assert run("parted", "train.steps=8", "--extend") == 130
    assert run("parted", "train.steps=8") == 0
    assert logged("parted") == logged("whole")
    assert len(records_of(RunFolder(Path("runs/parted")))) == 1


def test_a_run_that_was_stopped_may_be_extended_too(run: Run) -> None:
    assert run("r") == 0
    folder = RunFolder(Path("runs/r"))
    folder.results.unlink()
    for path in (folder.checkpoints / "step-000000004").iterdir():
        path.unlink()
    (folder.checkpoints / "step-000000004").rmdir()
    assert run("r", "train.steps=8", "--extend") == 0
    (record,) = records_of(folder)
    assert (record["after_step"], record["results"]) == (2, None)
    assert sorted(logged("r")) == list(range(1, 9))


class TestRefusals:
    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory: pytest.TempPathFactory, run_text: str) -> Path:
        """A folder with one finished run, which each test gets a copy of."""
        folder = tmp_path_factory.mktemp("finished")
        (folder / "r.yaml").write_text(run_text)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("raysl.run.page.draw_all", lambda *_, **__: [])
            assert main(["pretrain", "r.yaml", *SHORT]) == 0
        return folder

    @pytest.fixture(autouse=True)
    def _trained(self, finished: Path, run: Run, tmp_path: Path) -> None:
        shutil.copytree(finished / "runs", tmp_path / "runs")

    def test_a_longer_run_without_the_word_is_told_of_it(
        self, run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("r", "train.steps=8") == 1
        assert "or --extend to continue this run to the new length" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["train.steps=3"], "it has 4 steps, and train.steps=3 is 3; give more"),
            (["train.steps=null", "train.epochs=0.8"], "train.epochs=0.8 is 4; give more"),
            (["train.steps=8", "optim.base_lr=0.2"], "optim.base_lr: 0.1 -> 0.2\n"),
            (["name=other", "train.steps=8"], "no run to extend; leave --extend out to start it"),
        ],
    )
    def test_what_is_no_longer_run_of_the_same_is_refused_and_nothing_is_lost(
        self, run: Run, capsys: pytest.CaptureFixture[str], words: list[str], told: str
    ) -> None:
        before = Path("runs/r/results.json").read_bytes()
        assert run("r", *words, "--extend") == 1
        said = capsys.readouterr().err
        assert told in said
        assert "or --extend" not in said
        assert Path("runs/r/results.json").read_bytes() == before
        assert records_of(RunFolder(Path("runs/r"))) == []

    def test_a_run_whose_checkpoints_are_gone(
        self, run: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.rmtree("runs/r/checkpoints")
        assert run("r", "train.steps=8", "--extend") == 1
        assert "contains none; --fresh trains the whole length" in capsys.readouterr().err
        assert Path("runs/r/results.json").exists()
