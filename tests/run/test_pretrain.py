"""The driver around the workers: which runs start, go on or only tell, and what is said of them.

A stand-in trains nothing, so that each case takes milliseconds; real runs are in
tests/run/test_worker.py, tests/run/test_ray_train.py and tests/end_to_end.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysl.errors import DivergedError, RunFolderError
from raysl.run import pretrain as driver
from raysl.run.ray_cluster import Layout
from raysl.run.recipe import load_run
from raysl.track.mlflow_problem import MlflowProblem
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder
from raysl.train.checkpoint import save_checkpoint
from raysl.train.keep import newest

pytestmark = pytest.mark.usefixtures("undrawn")

Train = Callable[..., Results]


class Worker:
    """Stands for a worker: notes each start, leaves a checkpoint, and may raise."""

    def __init__(self) -> None:
        self.starts: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, config: Any, *, folder: RunFolder, **more: Any) -> Results:
        self.starts.append("ray" if "layout" in more else "here")
        assert folder.config.exists(), "the folder is claimed before anything starts"
        save_checkpoint(folder.checkpoints, {}, step=config.train.steps, keep=newest(1))
        if self.error is not None:
            raise self.error
        return {"steps": config.train.steps, "knn_top1": 0.5}


class Tracker:
    """Stands for MLflow's tracker: notes with which status it ends."""

    def __init__(self) -> None:
        self.uri, self.run_id = "sqlite:///m.db", "abc"
        self.problem: str | None = None
        self.trouble: MlflowProblem | None = None
        self.statuses: list[str] = []

    def finish(self, *, status: str, **_: Any) -> None:
        self.statuses.append(status)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    made = Worker()
    monkeypatch.setattr(driver, "pretrain_here", made)
    monkeypatch.setattr(driver, "pretrain_on_ray", made)
    return made


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    made = Tracker()
    monkeypatch.setattr(driver, "start_tracker", lambda *_, **__: made)
    return made


@pytest.fixture
def train(run_yaml: Callable[[str], Path], worker: Worker) -> Train:
    def start(*overrides: str, fresh: bool = False, extend: bool = False) -> Results:
        config = load_run(run_yaml("r"), overrides)
        return driver.train_run(config, began_at=0.0, fresh=fresh, extend=extend)

    return start


FOLDER = Path("runs/r")


def test_a_new_run_says_what_starts_and_keeps_its_results(
    train: Train, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    results = train()
    said = capsys.readouterr()
    assert "r starts: simclr, resnet18, 160 images from digits/train, 6 steps of 32" in said.err
    assert results["run_dir"] == str(FOLDER.absolute())
    assert RunFolder(FOLDER).read_results() == results
    assert results["mlflow_run_id"] is None
    assert "50.0% top-1 accuracy on the test images" in said.out
    assert worker.starts == ["here"]


def test_a_finished_run_trains_nothing_and_tells_the_same(
    train: Train, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train()
    assert train() == first
    assert worker.starts == ["here"]
    assert "this run is finished; --extend with a larger train.epochs or train.steps" in (
        capsys.readouterr().err
    )


def test_results_of_a_start_that_did_not_come_to_its_end_do_not_make_it_finished(
    train: Train, worker: Worker
) -> None:
    train()
    folder = RunFolder(FOLDER)
    folder.write_results({"steps": 6})  # the worker's own, before the driver adds the place
    assert "run_dir" in train()
    assert worker.starts == ["here", "here"]


def test_an_interrupted_run_says_the_step_that_it_goes_on_after(
    train: Train, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        train()
    worker.error = None
    train()
    assert "r resumes after step 6: simclr" in capsys.readouterr().err


class TestOtherSettings:
    @pytest.mark.parametrize(
        ("overrides", "extend", "told"),
        [
            (["optim.base_lr=0.2"], False, "optim.base_lr: 0.1 -> 0.2\nGive this one another"),
            (["optim.base_lr=0.2"], True, "optim.base_lr: 0.1 -> 0.2\nGive this one another"),
            (["train.steps=9"], False, "train.steps: 6 -> 9\nGive this one another name=..."),
        ],
    )
    def test_are_refused_with_what_differs(
        self, train: Train, worker: Worker, overrides: list[str], extend: bool, told: str
    ) -> None:
        train()
        before = (FOLDER / "config.yaml").read_bytes()
        with pytest.raises(RunFolderError, match="holds a run with other settings") as caught:
            train(*overrides, extend=extend)
        assert told in str(caught.value)
        assert ("or --extend to continue" in str(caught.value)) == (overrides == ["train.steps=9"])
        assert worker.starts == ["here"]
        assert (FOLDER / "config.yaml").read_bytes() == before

    def test_of_the_cluster_and_of_tracking_are_free(self, train: Train, worker: Worker) -> None:
        first = train()
        assert train("cluster.num_data_workers=2", "track.experiment=other") == first
        assert worker.starts == ["here"]

    def test_start_anew_with_fresh_and_the_old_run_keeps_its_files(
        self, train: Train, worker: Worker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train()
        train("optim.base_lr=0.2", fresh=True)
        (aside,) = Path("runs").glob("r.*")
        assert "the earlier run is now in" in capsys.readouterr().err
        assert RunFolder(aside).read_results() is not None
        assert worker.starts == ["here", "here"]

    def test_extend_needs_a_run(self, train: Train, worker: Worker) -> None:
        with pytest.raises(RunFolderError, match="no run to extend; leave --extend out"):
            train(extend=True)
        assert worker.starts == []

    def test_a_larger_length_with_extend_is_trained_and_written_down(
        self, train: Train, worker: Worker
    ) -> None:
        train()
        assert train("train.steps=9", extend=True)["steps"] == 9
        assert worker.starts == ["here", "here"]
        assert RunFolder(FOLDER).extensions.exists()


class TestTracking:
    @pytest.mark.parametrize(
        ("error", "status"),
        [(None, "FINISHED"), (KeyboardInterrupt(), "KILLED"), (DivergedError("nan"), "FAILED")],
    )
    def test_ends_as_the_run_does(
        self,
        train: Train,
        worker: Worker,
        tracker: Tracker,
        error: BaseException | None,
        status: str,
    ) -> None:
        worker.error = error
        if error is None:
            assert train("track.mlflow=true")["mlflow_run_id"] == "abc"
        else:
            with pytest.raises(type(error)):
                train("track.mlflow=true")
        assert tracker.statuses == [status]

    def test_what_mlflow_did_not_take_is_sent_by_the_same_command_once(
        self, train: Train, worker: Worker, tracker: Tracker, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tracker.problem, tracker.trouble = "no answer", MlflowProblem("no answer", None)
        assert train("track.mlflow=true")["mlflow_problem"] == "no answer"
        assert "the same command sends the rest" in capsys.readouterr().err
        tracker.problem = tracker.trouble = None
        for _ in range(2):
            assert train("track.mlflow=true")["mlflow_problem"] is None
        assert worker.starts == ["here"]
        assert tracker.statuses == ["FINISHED"] * 2


class Cluster:
    """Stands for Ray: a layout of two train workers, and whether it was left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, connected: bool = True) -> None:
        self.left: list[str] = []
        stand_ins = SimpleNamespace(
            connect=lambda: connected,
            disconnect=lambda: self.left.append("left"),
            wait_for_roles=lambda _: None,
            plan_layout=lambda _: Layout(2, 1.0, 3, 0.5, False, 4, 1),
            describe_cluster=lambda: {},
            check_cluster=lambda *_: ["a node is slow"],
        )
        for name, stand_in in vars(stand_ins).items():
            monkeypatch.setattr(driver, name, stand_in)


class TestOnRay:
    @pytest.mark.parametrize("connected", [True, False])
    @pytest.mark.parametrize("fails", [True, False])
    def test_it_says_the_layout_and_leaves_only_a_ray_that_it_started(
        self,
        train: Train,
        worker: Worker,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        connected: bool,
        fails: bool,
    ) -> None:
        cluster = Cluster(monkeypatch, connected=connected)
        if fails:
            worker.error = DivergedError("nan")
            with pytest.raises(DivergedError):
                train("cluster.num_train_workers=2")
        else:
            train("cluster.num_train_workers=2")
        assert worker.starts == ["ray"]
        assert cluster.left == (["left"] if connected else [])
        printed = capsys.readouterr().err
        assert "2 train worker(s) on CPU (4 threads), 3 data worker(s), 1 node(s)\n" in printed
        assert "  a node is slow\n" in printed

    @pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
    def test_workers_start_before_mlflow_answers_and_the_run_is_tracked(
        self,
        train: Train,
        worker: Worker,
        tracker: Tracker,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: BaseException | None,
    ) -> None:
        Cluster(monkeypatch)
        worker.error, answers = error, threading.Event()

        def start(*_: Any, tell: Callable[[str], None], **__: Any) -> Tracker:
            assert answers.wait(60)
            tell("MLflow answers late")
            return tracker

        def trains(*arguments: Any, **more: Any) -> Results:
            answers.set()  # without the thread the start would wait in vain
            return worker(*arguments, **more)

        monkeypatch.setattr(driver, "start_tracker", start)
        monkeypatch.setattr(driver, "load_mlflow", lambda _: None)
        monkeypatch.setattr(driver, "pretrain_on_ray", trains)
        words = ["cluster.num_train_workers=2", "track.mlflow=true"]
        if error is None:
            assert train(*words)["mlflow_run_id"] == "abc"
        else:
            with pytest.raises(KeyboardInterrupt):
                train(*words)
        assert tracker.statuses == ["FINISHED" if error is None else "KILLED"]
        assert "MLflow answers late\n" in capsys.readouterr().err
