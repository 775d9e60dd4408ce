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
        assert main([*command, "train.checkpoint_retry_s=0.5"]) == 1
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


def test_a_memory_that_processes_do_not_share_is_refused_before_anything_is_written(
    run_yaml: RunYaml,
) -> None:
    config = load_run(run_yaml("a"), ["cluster.num_train_workers=1", "output_dir=memory://x/runs"])
    with (
        pytest.raises(ConfigError, match="a memory of its own"),
        stored.opened_folder(config, Path(), fresh=False),
    ):
        pytest.fail("opened")
    assert Store("memory://x/runs/a").list() == {}


class TestFineTuningAtTheEnd:
    """Runs below a run's folder, each with a local copy of its own."""

    FINAL = (
        "evaluate.final=[knn,finetune]", "evaluate.seeds=[0]",
        "evaluate.finetune={label_fraction: 0.5, epochs: 1, batch_size: 16}",
    )  # fmt: skip

    def test_is_interrupted_and_goes_on_to_the_same_as_on_a_disk(
        self,
        run_yaml: RunYaml,
        bucket: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        command = ["pretrain", str(run_yaml("a")), *self.FINAL]
        assert main([*command, "output_dir=disk"]) == 0
        disk = RunFolder(tmp_path / "disk" / "a")
        ends = loop.Trainer._end_if

        def stop(self: loop.Trainer, stops: bool, steps_done: int) -> None:
            if type(self.method).__name__ == "Supervised" and steps_done == 2:
                raise StoppedError("after step 2")
            ends(self, stops, steps_done)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "_end_if", stop)
            assert main([*command, f"output_dir={bucket}/runs"]) != 0
        store = Store(f"{bucket}/runs/a")
        (name,) = {each.split("/")[1] for each in store.list("protocols")}
        assert checkpoint_steps(Store(f"{store.address}/protocols/{name}"))[-1] == 2
        assert store.get("results.json") is None
        monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "another machine"))
        assert main([*command, f"output_dir={bucket}/runs"]) == 0
        there = fetched(store, tmp_path / "fetched")
        results, expected = there.read_results(), disk.read_results()
        assert results is not None
        assert expected is not None
        assert results["finetune_top1"] == expected["finetune_top1"]
        # What was measured before the fine-tuning is measured again.
        assert set(curve(there.metrics)) == set(curve(disk.metrics))
        inner = [each / "protocols" / name for each in (there.path, disk.path)]
        assert curve(inner[0] / "metrics.jsonl") == curve(inner[1] / "metrics.jsonl")
        assert encoder_digest(inner[0] / "encoder.safetensors") == encoder_digest(
            inner[1] / "encoder.safetensors"
        )
        text = (inner[0] / "config.yaml").read_text()
        assert f"weights: {store.address}/encoder.safetensors" in text
        assert "another machine" not in text
        assert list((tmp_path / "another machine").iterdir()) == []

    def test_of_another_encoder_is_moved(self, run_yaml: RunYaml, tmp_path: Path) -> None:
        place = f"memory://{tmp_path.name}/runs"
        command = ["pretrain", str(run_yaml("a")), *self.FINAL, f"output_dir={place}"]
        assert main(command) == 0
        assert main([*command, "train.steps=8", "--extend"]) == 0
        below = Store(f"{place}/a/protocols").list()
        new, old = sorted({name.split("/")[0] for name in below}, key=len)
        assert old.startswith(f"{new}.")
        assert {f"{new}/results.json", f"{old}/results.json"} <= set(below)


@pytest.mark.parametrize(
    "address", ["s3://key:hidden@bucket/runs", "s3://bucket/runs?access_key=key&secret_key=hidden"]
)
def test_a_password_in_output_dir_is_a_bad_key_that_is_not_repeated(
    address: str, run_yaml: RunYaml
) -> None:
    with pytest.raises(ConfigError, match=r"output_dir: .*neither a password") as caught:
        load_run(run_yaml("a"), [f"output_dir={address}"])
    assert "hidden" not in str(caught.value)
