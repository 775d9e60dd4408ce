"""Runs whose output_dir is in a store: on a real server, interrupted, refused, without a store."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.errors import ConfigError, RunFolderError, StoppedError
from raysl.evaluate.embedding import encoder_digest
from raysl.run import stored
from raysl.run.recipe import RunConfig, load_run
from raysl.store import objects
from raysl.store.lease import LEASE
from raysl.store.mirror import checkpoint_steps
from raysl.store.objects import Store
from raysl.store.scratch import scratch_base
from raysl.track.run_folder import RunFolder, read_metrics
from raysl.train import loop

pytestmark = pytest.mark.usefixtures("undrawn")

RunYaml = Callable[[str], Path]

_KILLED_AT_STEP_5 = """
import os, signal, sys
from raysl.cli import main
from raysl.train import loop
step = loop.Trainer._step
def killed(self, batch, progress):
    if progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, progress)
loop.Trainer._step = killed
main(sys.argv[1:])
"""


def curve(path: Path) -> list[tuple[int, str, float]]:
    """The losses and evaluations of a metrics file, without times and speeds."""
    return [
        (record["step"], name, value)
        for record in read_metrics(path)
        for name, value in record.items()
        if name.startswith(("train/loss", "eval/", "final/"))
    ]


def fetched(store: Store, folder: Path) -> RunFolder:
    """A copy of all that a store holds of a run."""
    for name in store.list():
        store.get_file(name, folder / name)
    return RunFolder(folder)


@pytest.fixture
def undisturbed(run_yaml: RunYaml, tmp_path: Path) -> RunFolder:
    """The same run on a disk, to the end."""
    assert main(["pretrain", str(run_yaml("a")), "output_dir=disk"]) == 0
    return RunFolder(tmp_path / "disk" / "a")


class TestAgainstTheDisk:
    def test_a_killed_run_goes_on_in_a_new_scratch_to_the_same_weights_and_curve(
        self, undisturbed: RunFolder, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ["pretrain", "a.yaml", f"output_dir={bucket}/runs"]
        ended = subprocess.run([sys.executable, "-c", _KILLED_AT_STEP_5, *command], check=False)
        assert ended.returncode == -9
        store = Store(f"{bucket}/runs/a")
        assert checkpoint_steps(store)[0] == 2  # the next may not have arrived
        assert store.get(LEASE) is not None
        monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "another machine"))
        assert main(command) == 0
        there = fetched(store, tmp_path / "fetched")
        assert encoder_digest(there.encoder) == encoder_digest(undisturbed.encoder)
        assert curve(there.metrics) == curve(undisturbed.metrics)
        assert store.get(LEASE) is None
        assert list((tmp_path / "another machine").iterdir()) == []
        results = there.read_results()
        assert results is not None
        assert results["run_dir"] == f"{bucket}/runs/a"
        assert checkpoint_steps(store) == [4, 6]

    def test_a_store_that_is_down_for_some_seconds_costs_only_time(
        self, undisturbed: RunFolder, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upload, down = Store._upload, [3]

        def breaks(self: Store, name: str, content: Any) -> None:
            if name.endswith("state.pt") and down[0]:
                down[0] -= 1
                raise OSError("NETWORK_CONNECTION: could not connect")
            upload(self, name, content)

        monkeypatch.setattr(Store, "_upload", breaks)
        assert main(["pretrain", "a.yaml", f"output_dir={bucket}/runs"]) == 0
        assert down == [0]
        there = fetched(Store(f"{bucket}/runs/a"), tmp_path / "fetched")
        assert encoder_digest(there.encoder) == encoder_digest(undisturbed.encoder)


class TestInMemory:
    """What needs no server; the store is this process's memory."""

    @pytest.fixture
    def command(
        self, run_yaml: RunYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> list[str]:
        monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "scratch"))
        place = f"memory://{tmp_path.name}/runs"
        return ["pretrain", str(run_yaml("a")), f"output_dir={place}"]

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store(f"memory://{tmp_path.name}/runs/a")

    def test_a_store_that_stays_down_ends_the_run_with_one_error(
        self,
        command: list[str],
        store: Store,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        upload = Store._upload

        def breaks(self: Store, name: str, content: Any) -> None:
            if name.endswith("step-000000004/state.pt"):
                raise OSError("NETWORK_CONNECTION: could not connect")
            upload(self, name, content)

        monkeypatch.setattr(Store, "_upload", breaks)
        monkeypatch.setattr(objects, "RETRY_S", 0.2)
        began = time.monotonic()
        assert main([*command, "train.checkpoint_retry_s=0.5"]) == 1
        assert time.monotonic() - began < 60
        error = capsys.readouterr().err
        assert error.count("RunFolderError: output_dir=") == 1
        assert "writing checkpoints/step-000000004/state.pt" in error
        assert checkpoint_steps(store) == [2]
        assert list(scratch_base().iterdir()) == []
        monkeypatch.setattr(Store, "_upload", upload)
        assert main(command) == 0
        assert checkpoint_steps(store)[-1] == 6

    def test_a_damaged_checkpoint_is_passed_over(
        self, command: list[str], store: Store, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(command) == 0
        name = "checkpoints/step-000000006/state.pt"
        whole = store.get(name)
        assert whole is not None
        store.put(name, whole[: len(whole) // 2])
        store.delete(["results.json"])
        assert main(command) == 0
        assert "resumes from step 4" in capsys.readouterr().err
        assert "checkpoints/damaged-step-000000006/state.pt" in store.list()
        assert store.get(name) == whole

    def test_a_run_is_extended_set_aside_and_left_alone(
        self, command: list[str], store: Store, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(command) == 0
        before = store.list()
        assert main(command) == 0
        assert "this run is finished" in capsys.readouterr().err
        assert {name: e.size for name, e in store.list().items()} == {
            name: e.size for name, e in before.items()
        }
        assert main([*command, "train.steps=8", "--extend"]) == 0
        assert json.loads(store.get("results.json") or b"{}")["steps"] == 8
        assert main([*command, "seed=1"]) == 1
        assert main([*command, "seed=1", "--fresh"]) == 0
        folders = {name.split("/")[0] for name in Store(store.address.rpartition("/")[0]).list()}
        assert len(folders) == 2
        assert json.loads(store.get("results.json") or b"{}")["steps"] == 6

    def test_a_stopped_run_has_its_checkpoint_in_the_store(
        self, command: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ends = loop.Trainer._end_if

        def stop(self: loop.Trainer, stops: bool, steps_done: int) -> None:
            if steps_done == 4:
                raise StoppedError("after step 4")
            ends(self, stops, steps_done)

        monkeypatch.setattr(loop.Trainer, "_end_if", stop)
        main(command)
        assert checkpoint_steps(store) == [2, 4]
        assert b'"step": 4' in (store.get("metrics.jsonl") or b"")

    def test_a_second_driver_is_told_who_trains(self, command: list[str]) -> None:
        config = load_run(Path(command[1]), command[2:])
        with (
            stored.opened_folder(config, Path(), fresh=False),
            pytest.raises(RunFolderError, match=r"memory://.*/runs/a: process \d+ of"),
            stored.opened_folder(config, Path(), fresh=False),
        ):
            pytest.fail("two hold the folder")

    def test_an_error_names_the_address_and_not_the_scratch(self, command: list[str]) -> None:
        config = load_run(Path(command[1]), command[2:])
        with (
            pytest.raises(RunFolderError) as caught,
            stored.opened_folder(config, Path(), fresh=False) as folder,
        ):
            raise RunFolderError(f"{folder.checkpoints}: bad")
        assert str(caught.value) == f"{config.output_dir}/a/checkpoints: bad"


class TestWorkers:
    """A worker has a scratch of its own, as on another node."""

    @pytest.fixture
    def config(
        self, run_yaml: RunYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> RunConfig[Any]:
        monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "scratch"))
        monkeypatch.setattr("raysl.store.publisher.EVERY_S", 0.02)
        address = f"file://{tmp_path}/store"
        return load_run(run_yaml("a")).model_copy(
            update={
                "output_dir": address,
                "cluster": load_run(run_yaml("a"), ["cluster.num_train_workers=1"]).cluster,
            }
        )

    def test_driver_and_workers_see_what_the_other_wrote(self, config: RunConfig[Any]) -> None:
        with stored.opened_folder(config, Path(), fresh=False) as driver:
            assert driver.stored is not None
            driver.config.write_text("name: a\n")
            driver.publish(waits=True)
            run = driver.stored.for_workers()
            with stored.worker_folder(driver.path, run) as rank0:
                assert rank0.path != driver.path
                assert rank0.config.read_text() == "name: a\n"
                assert stored.start_worker(rank0, agreed=lambda own: own, rank=0) == 0
                rank0.metrics.write_text('{"step": 1}\n')
                assert until(driver.metrics.exists)
                driver.stop.touch()
                assert until(rank0.stop.exists)
                state = rank0.checkpoints / "step-000000001" / "state.pt"
                state.parent.mkdir(parents=True)
                state.write_bytes(b"state")
                rank0.write_results({"steps": 1})
                rank0.publish(waits=True)
            driver.fetch()
            assert driver.read_results() == {"steps": 1}
            assert not driver.checkpoints.exists()
            with stored.worker_folder(driver.path, run) as rank1:
                assert stored.start_worker(rank1, agreed=lambda own: own, rank=1) == 1
                assert (rank1.checkpoints / "step-000000001" / "state.pt").exists()
                assert not rank1.metrics.exists()
                rank1.error.write_text('{"error": "DataError", "message": "m"}')
                rank1.publish(waits=True)
            assert run.store.get("error.json") is not None

    def test_a_worker_whose_driver_lost_the_lease_writes_nothing(
        self, config: RunConfig[Any]
    ) -> None:
        with stored.opened_folder(config, Path(), fresh=False) as driver:
            assert driver.stored is not None
            run = driver.stored.for_workers()._replace(token="an earlier driver's")
            with stored.worker_folder(driver.path, run) as worker:
                stored.start_worker(worker, agreed=lambda own: own, rank=0)
                worker.metrics.write_text('{"step": 1}\n')
                with pytest.raises(RunFolderError, match="has taken it over"):
                    worker.publish(waits=True)
            assert run.store.get("metrics.jsonl") is None


def until(happens: Callable[[], bool]) -> bool:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 20
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happens()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.final=[finetune]", "raysl finetune memory://x/runs/a"),
        ("cluster.num_train_workers=1", "a memory of its own"),
    ],
)
def test_what_only_works_on_a_disk_is_refused_before_anything_is_written(
    override: str, message: str, run_yaml: RunYaml
) -> None:
    config = load_run(run_yaml("a"), [override, "output_dir=memory://x/runs"])
    with (
        pytest.raises(ConfigError, match=message),
        stored.opened_folder(config, Path(), fresh=False),
    ):
        pytest.fail("opened")
    assert Store("memory://x/runs/a").list() == {}


@pytest.mark.parametrize(
    "address", ["s3://key:hidden@bucket/runs", "s3://bucket/runs?access_key=key&secret_key=hidden"]
)
def test_a_password_in_output_dir_is_a_bad_key_that_is_not_repeated(
    address: str, run_yaml: RunYaml
) -> None:
    with pytest.raises(ConfigError, match=r"output_dir: .*neither a password") as caught:
        load_run(run_yaml("a"), [f"output_dir={address}"])
    assert "hidden" not in str(caught.value)
