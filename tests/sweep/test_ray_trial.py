"""A trial in Tune's process: which images it uses again, and what Tune sends it on with."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysl.config.load import read_mapping
from raysl.config.yaml_text import to_yaml
from raysl.errors import ClusterError
from raysl.folder.whole import write_json
from raysl.run.recipe import RunConfig, load_run
from raysl.sweep import ray_trial
from raysl.sweep.ray_trial import source_key
from raysl.sweep.trial import Change, newest_change, write_change
from raysl.track.run_folder import RunFolder, checkpoint_path

LR = "optim.base_lr"
SPACE: Any = {}

Load = Callable[..., RunConfig[Any]]


@pytest.fixture
def load(run_yaml: Callable[[str], Path]) -> Load:
    return lambda *overrides: load_run(run_yaml("r"), overrides)


@pytest.fixture
def folder(load: Load) -> RunFolder:
    made = RunFolder(Path("trials/0003"))
    made.path.mkdir(parents=True)
    made.config.write_text(to_yaml(load().model_dump(mode="json")))
    return made


class TestSourceKey:
    @pytest.mark.parametrize(
        "overrides",
        [
            ["optim.base_lr=0.5"],
            ["data.views.kinds.0.size_px=16"],
            ["evaluate.source=digits"],  # a method without labels sees none of them
        ],
    )
    def test_is_the_same_where_training_sees_the_same_images(
        self, load: Load, overrides: list[str]
    ) -> None:
        assert source_key(load(*overrides)) == source_key(load())

    @pytest.mark.parametrize(
        "overrides",
        [["data.limit=150"], ["data.bad_images={max_share: 0.5}"], ["data.mean=[0.1,0.2,0.3]"]],
    )
    def test_differs_with_any_other_setting_of_the_images(
        self, load: Load, overrides: list[str]
    ) -> None:
        assert source_key(load(*overrides)) != source_key(load())


class TestImages:
    @pytest.fixture(autouse=True)
    def _nothing_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_trial, "_SOURCES", {})
        monkeypatch.setattr(ray_trial, "_SETS", {})

    def test_are_the_drivers_or_opened_once(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[Any] = []
        monkeypatch.setattr(
            ray_trial, "open_training_source", lambda *given: opened.append(given) or object()
        )
        shelf: Any = {source_key(load()): "the driver's"}
        assert ray_trial._source_of(load(), shelf) == "the driver's"
        assert ray_trial._source_of(load("optim.base_lr=0.5"), {}) == "the driver's"
        other = load("data.limit=150")
        assert ray_trial._source_of(other, shelf) is ray_trial._source_of(other, shelf)
        assert len(opened) == 1

    def test_to_measure_on_are_decoded_once_a_size(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[int] = []

        def open_sets(config: RunConfig[Any], source: Any, *, num_threads: int) -> None:
            opened.append(config.image_size_px)

        monkeypatch.setattr(ray_trial, "open_sets", open_sets)
        source: Any = object()
        for overrides in ([], ["optim.base_lr=0.5"], ["data.views.kinds.0.size_px=16"], []):
            ray_trial._sets_of(load(*overrides), source, num_threads=1)
        assert opened == [32, 16]  # also where there were none to open


class TestConfig:
    def test_has_what_changed_in_flight(self, folder: RunFolder) -> None:
        assert ray_trial._config_of(folder).optim.base_lr == 0.1
        write_change(folder, Change(3, {LR: 0.4}, {LR: 0.4}))
        assert ray_trial._config_of(folder).optim.base_lr == 0.4
        assert read_mapping(folder.config)["optim"]["base_lr"] == 0.1

    def test_of_a_folder_that_the_node_does_not_see(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
        with pytest.raises(ClusterError, match=r"node 10\.0\.0\.7 does not see .*all share"):
            ray_trial._config_of(RunFolder(tmp_path / "nowhere"))


class TestExchange:
    @pytest.fixture
    def sent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Let Tune send the trial on with the checkpoint of a folder; None: with none."""

        def send(donor: RunFolder | None, step: int = 0) -> None:
            pointer = tmp_path / "pointer"
            pointer.mkdir(exist_ok=True)
            if donor is not None:
                found = {"folder": str(donor.path), "step": step}
                write_json(pointer / "checkpoint.json", found)

            @contextmanager
            def as_directory() -> Any:
                yield str(pointer)

            checkpoint = None if donor is None else SimpleNamespace(as_directory=as_directory)
            monkeypatch.setattr(ray_trial.tune, "get_checkpoint", lambda: checkpoint)

        return send

    @staticmethod
    def exchange(folder: RunFolder, **params: Any) -> None:
        given = {"number": 3, **{key.replace("__", "."): v for key, v in params.items()}}
        ray_trial._exchange(folder, given, SPACE, total_steps=6)

    def test_new_settings_hold_from_the_newest_checkpoint(
        self, folder: RunFolder, sent: Callable[..., None]
    ) -> None:
        sent(None)
        checkpoint_path(folder.checkpoints, 4).mkdir(parents=True)
        self.exchange(folder, optim__base_lr=0.3)
        assert newest_change(folder) == Change(4, {LR: 0.3}, {LR: 0.3})

    def test_without_settings_nothing_is_written(
        self, folder: RunFolder, sent: Callable[..., None]
    ) -> None:
        sent(None)
        self.exchange(folder)
        assert newest_change(folder) is None

    def test_a_finished_trial_stays_as_it_is(
        self, folder: RunFolder, sent: Callable[..., None]
    ) -> None:
        sent(None)
        folder.write_results({"steps": 6})
        self.exchange(folder, optim__base_lr=0.3)
        assert newest_change(folder) is None

    def test_its_own_checkpoint_is_not_copied(
        self, folder: RunFolder, sent: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_trial, "take_over", lambda *_, **__: pytest.fail("copied"))
        sent(folder, step=4)
        self.exchange(folder, optim__base_lr=0.3)
        assert newest_change(folder) is not None

    @pytest.mark.parametrize("taken", [True, False])
    def test_settings_come_only_with_the_checkpoint_that_they_trained(
        self,
        folder: RunFolder,
        sent: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
        taken: bool,
    ) -> None:
        asked: list[Any] = []

        def take_over(ours: RunFolder, donor: str, **given: Any) -> int:
            asked.append((ours.path.name, Path(donor).name, given))
            return int(taken)

        monkeypatch.setattr(ray_trial, "take_over", take_over)
        sent(RunFolder(Path("trials/0001")), step=4)
        self.exchange(folder, optim__base_lr=0.3)
        assert asked == [("0003", "0001", {"step": 4, "total_steps": 6})]
        assert (newest_change(folder) is not None) == taken
