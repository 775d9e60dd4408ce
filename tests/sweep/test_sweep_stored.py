"""A sweep in a store: every trial writes its own folder there, the driver reads it there.

A stand-in for Ray Tune trains the trials in this process. tests/end_to_end/test_stored_sweep.py
runs one on Ray.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysl.cli import main
from raysl.errors import RunFolderError
from raysl.evaluate.embedding import encoder_digest
from raysl.folder.whole import write_json
from raysl.run.held import held_folder
from raysl.store.lease import LEASE
from raysl.store.objects import Store
from raysl.store.reading import local_copy
from raysl.sweep import ray_trial
from raysl.sweep import start as start_module
from raysl.sweep.ray_shares import Shares
from raysl.sweep.trial import SWEEP, Change, SweepFolder, write_change
from raysl.sweep.trial_run import take_over
from raysl.track.run_folder import RunFolder, list_checkpoints, read_metrics

SWEEP_TEXT = """\
base: base.yaml
space: {method.temperature: {grid: [0.1, 0.2, 0.5]}}
search: {name: grid}
track: {mlflow: false}
"""


class Stopped(BaseException):
    """What Tune raises in a trial that its scheduler stops."""


class Tune:
    """Stands for Ray Tune: trains trial after trial, stops trial 1 at its first evaluation."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.dies_in: int | None = None
        self.seen: list[int] = []
        """Evaluations that the driver saw of each trial when it was told of its end."""

    def sweep(self, sweep: Any, suggestions: Any, watcher: Any, **given: Any) -> Mapping[int, str]:
        folder: SweepFolder = given["folder"]
        place = folder.path if folder.stored is None else folder.stored.for_workers()
        while (suggestion := suggestions.next()) is not None:
            number = suggestion[0]
            watcher.started(number)
            self.trained.append(number)
            context = SimpleNamespace(
                get_trial_name=lambda number=number: f"{number:04d}",
                get_trial_resources=lambda: SimpleNamespace(head_cpus=1.0),
            )

            def report(values: Mapping[str, float], number: int = number) -> None:
                watcher.reported(number, values)
                if number == self.dies_in:
                    raise KeyboardInterrupt
                if number == 1:
                    raise Stopped

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    ray_trial,
                    "tune",
                    SimpleNamespace(get_context=lambda c=context: c, report=report),
                )
                with suppress(Stopped):
                    ray_trial.trial_in_process(
                        {"number": number},
                        sweep=place,
                        sources=given["sources"],
                        metrics=(sweep.metric.name,),
                        exchanges=False,
                    )
            watcher.ended(number, error=None)
            self.seen.append(len(watcher._trials[number].curve))
        return {}


@pytest.fixture
def tune(run_yaml: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    run_yaml("base")
    (tmp_path / "s.yaml").write_text(SWEEP_TEXT)
    made = Tune()
    monkeypatch.setattr(start_module, "connect", lambda: False)
    monkeypatch.setattr(
        start_module, "plan_shares", lambda *_, **__: Shares(1, 1.0, 0.0, False, "")
    )
    monkeypatch.setattr(start_module, "sweep_on_ray", made.sweep)
    return made


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """The results of a sweep without times and places."""
    left_out = ("sweep_dir", "best_config", "placed_s", "training_share")
    return {key: value for key, value in results.items() if key not in left_out}


def measured(path: Path) -> list[tuple[int, str, float]]:
    return [
        (record["step"], name, record[name])
        for record in read_metrics(path)
        for name in ("train/loss", "eval/knn_top1", "final/knn_top1")
        if name in record
    ]


def test_a_sweep_that_is_interrupted_goes_on_elsewhere_and_equals_that_on_a_disk(
    tune: Tune,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ran(*overrides: str) -> dict[str, Any]:
        assert main(["sweep", "s.yaml", *overrides, "--json"]) == 0
        results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return results

    on_disk = ran("output_dir=disk")
    assert (on_disk["finished"], on_disk["stopped_early"]) == (2, 1)
    disk = SweepFolder(tmp_path / "disk" / "s")
    tune.trained.clear()
    tune.dies_in = 2
    place = f"output_dir={bucket}/runs"
    assert main(["sweep", "s.yaml", place]) == 130
    assert tune.trained == [0, 1, 2]
    store = Store(f"{bucket}/runs/s")
    assert store.get(LEASE) is None
    assert json.loads(store.get("trials/0001/trial.json") or b"")["status"] == "stopped"
    before = store.list("trials/0000")

    monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "another machine"))
    tune.trained.clear()
    tune.dies_in = None
    in_store = ran(place)
    assert tune.trained == [2]
    assert compared(in_store) == compared(on_disk)
    assert in_store["sweep_dir"] == store.address
    assert {k: v for k, v in store.list("trials/0000").items() if k in before} == before
    assert list((tmp_path / "another machine").iterdir()) == []

    there = SweepFolder(tmp_path / "fetched")
    for name in store.list():
        store.get_file(name, there.path / name)
    for number in range(3):
        pair = [each.trial(number) for each in (there, disk)]
        assert measured(pair[0].metrics) == measured(pair[1].metrics)
        if number != 1:
            assert encoder_digest(pair[0].encoder) == encoder_digest(pair[1].encoder)
            address = f"{store.address}/trials/{number:04d}"
            assert encoder_digest(local_copy(address) / "encoder.safetensors") == encoder_digest(
                pair[1].encoder
            )
    page = there.report.read_text()
    assert "another machine" not in page
    assert f"raysl pretrain {store.address}/best.yaml" in page
    assert main(["config", f"{store.address}/best.yaml"]) == 0
    assert not [name for name in store.list() if "/.tune/" in f"/{name}"]
    assert main(["sweep", "s.yaml", place]) == 0
    assert "this sweep is finished" in capsys.readouterr().err


def test_the_driver_sees_every_evaluation_of_a_trial_when_it_is_told_of_its_end(
    tune: Tune, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysl.store.publisher.EVERY_S", 3600.0)  # only what is asked for
    monkeypatch.setattr("raysl.sweep.page.draw_sweep", lambda *_, **__: [])
    assert main(["sweep", "s.yaml", f"output_dir={bucket}/runs"]) == 0
    assert tune.seen == [2, 1, 2]


def test_a_second_driver_is_told_who_works_in_the_folder(tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}/s"
    with (
        held_folder(place, SweepFolder, SWEEP),
        pytest.raises(RunFolderError, match=r"process \d+ of .* give this sweep another name"),
        held_folder(place, SweepFolder, SWEEP),
    ):
        pytest.fail("two hold the folder")


def test_a_memory_is_no_store_for_a_sweep(tune: Tune, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "s.yaml", "output_dir=memory://x/runs"]) == 1
    assert "a memory of its own" in capsys.readouterr().err


class TestPopulation:
    """Trials of population based training copy checkpoints of others, and change settings."""

    def test_a_checkpoint_of_another_trial_replaces_those_in_the_store(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "scratch"))
        root = f"memory://{tmp_path.name}/s"
        store = Store(root)
        for trial, steps in (("0000", (2, 4)), ("0001", (2, 4))):
            for step in steps:
                name = f"trials/{trial}/checkpoints/step-{step:09d}/state.pt"
                store.put(name, f"{trial} {step}".encode())
        store.put("trials/0001/config.yaml", b"cluster: {num_train_workers: 0}\n")
        monkeypatch.setattr(ray_trial, "_config_of", lambda _: SimpleNamespace(cluster=Local))
        monkeypatch.setattr("raysl.run.stored.is_damaged", lambda *_, **__: False)
        with held_folder(root, SweepFolder, SWEEP) as sweep:
            assert sweep.stored is not None
            with ray_trial._opened(sweep.stored.for_workers(), "0001") as folder:
                assert list_checkpoints(folder.checkpoints) == [4]
                assert take_over(folder, f"{root}/trials/0000", step=2, total_steps=8) == 2
                write_change(folder, Change(2, {"a": 1}, {"a": 1}))
                folder.publish(waits=True)
                sweep.fetch_trial(1)
                assert (sweep.trial(1).path / "changes.json").exists()
        assert [name for name in store.list("trials/0001") if name.endswith(".pt")] == [
            "trials/0001/checkpoints/step-000000002/state.pt"
        ]
        assert store.get("trials/0001/checkpoints/step-000000002/state.pt") == b"0000 2"


class Local:
    counts = range(1, 2)


def test_a_store_that_is_down_at_the_end_of_a_trial_leaves_the_trial_unended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysl.sweep.config import SweepConfig
    from raysl.sweep.space import Candidate
    from raysl.sweep.trial import read_trials, write_trial
    from raysl.sweep.watch import SweepWatch

    sweep = SweepConfig(name="s", base=("base.yaml",))
    with held_folder(f"memory://{tmp_path.name}/s", SweepFolder, SWEEP) as folder:
        write_trial(folder.trial(0), Candidate(0, {}, {}, "base.yaml"))
        trials = read_trials(folder, sweep.metric)
        watch = SweepWatch(sweep, folder, tracking=None, trials=trials)

        def down(_: int) -> None:
            raise RunFolderError("the store is down")

        monkeypatch.setattr(folder, "fetch_trial", down)
        watch.started(0)
        watch.ended(0, error=None)
        assert watch.unread == {0: "the store is down"}
        assert [trial.status for trial in read_trials(folder, sweep.metric)] == ["waiting"]
        monkeypatch.undo()
        write_json(RunFolder(folder.trial(0).path).results, {})
        watch.ended(0, error=None)
        assert [trial.status for trial in read_trials(folder, sweep.metric)] == ["finished"]
