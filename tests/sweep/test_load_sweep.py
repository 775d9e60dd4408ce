from pathlib import Path
from typing import Any

import pytest

from raysl.config.yaml_text import to_yaml
from raysl.errors import ConfigError
from raysl.sweep.load import load_sweep
from raysl.sweep.space import draw

SWEEP: dict[str, Any] = {
    "base": "base.yaml",
    "set": {"data.limit": 100},
    "space": {"method.temperature": {"grid": [0.1, 0.2]}},
    "scheduler": {"name": "asha", "grace_epochs": 1},
    "search": {"name": "grid"},
}


def _write(folder: Path, **sections: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(to_yaml(SWEEP | sections))
    return path


def _lines(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of the error that loading raises, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load_sweep(path, overrides)
    heading, *lines = str(caught.value).split("\n")
    number = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    assert heading == f"{' '.join([str(path), *overrides])}: {number}"
    return [line.removeprefix("  ") for line in lines]


class TestFiles:
    def test_its_name_is_the_file_s(self, base: Path) -> None:
        assert load_sweep(_write(base.parent)).name == "mine"
        assert load_sweep(_write(base.parent, name="other")).name == "other"

    def test_metrics_beside_the_word_full_have_their_old_meaning(self, base: Path) -> None:
        metric = {
            "name": "final/linear_top1",
            "also": ["final/untrained_linear_top1", "train/loss"],
        }
        old = {"metric": metric, "scheduler": {"name": "none"}}
        sweep = load_sweep(_write(base.parent, **old, final="full"))
        assert sweep.metric.name == "final/linear_lbfgs_top1"
        assert sweep.metric.also == ("final/untrained_linear_lbfgs_top1", "train/loss")
        named = load_sweep(_write(base.parent, **old, final=["knn", "linear"]))
        assert named.metric.name == "final/linear_top1"

    def test_bases_are_found_from_its_own_folder(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "sweeps").mkdir()
        path = _write(tmp_path / "sweeps", base="../base.yaml")
        monkeypatch.chdir(tmp_path / "sweeps")
        assert load_sweep(Path("mine.yaml")).base == (str(base),)
        assert load_sweep(path).base == (str(base),)

    def test_a_star_is_every_name_in_order(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "runs").mkdir()
        for name in ("b", "a"):
            (tmp_path / "runs" / f"{name}.yaml").write_text(base.read_text())
        sweep = load_sweep(_write(tmp_path, base=["base.yaml", "runs/*.yaml"]))
        assert list(sweep.bases) == ["base", "a", "b"]

    def test_a_star_that_is_no_name_is_no_file(self, base: Path) -> None:
        assert "nothing" in _lines(_write(base.parent, base="nothing/*.yaml"))[0]

    def test_a_sweep_may_extend_another(self, base: Path) -> None:
        _write(base.parent)
        path = base.parent / "longer.yaml"
        path.write_text("extends: mine.yaml\nbudget: {epochs: 9}\n")
        sweep = load_sweep(path)
        assert (sweep.name, sweep.budget.epochs, list(sweep.space)) == (
            "longer",
            9,
            ["method.temperature"],
        )


class TestOverrides:
    def test_a_field_of_the_sweep_changes_the_sweep(self, base: Path) -> None:
        overrides = ["name=b", "repeats=2", "budget.hours=0.5", "resources.gpus_per_trial=0.25"]
        sweep = load_sweep(_write(base.parent), overrides)
        assert (sweep.name, sweep.repeats, sweep.budget.hours) == ("b", 2, 0.5)
        assert sweep.resources.gpus_per_trial == 0.25

    def test_a_section_of_a_run_goes_into_set(self, base: Path) -> None:
        sweep = load_sweep(_write(base.parent), ["data.limit=50", "optim={base_lr: 0.1}"])
        assert sweep.set == {"data.limit": 50, "optim": {"base_lr": 0.1}}

    def test_seed_and_track_are_the_sweep_s(self, base: Path) -> None:
        sweep = load_sweep(_write(base.parent), ["seed=3", "track.experiment=mine"])
        assert (sweep.seed, sweep.track.experiment, sweep.set) == (3, "mine", {"data.limit": 100})

    def test_a_dimension_is_named_by_its_dotted_setting(self, base: Path) -> None:
        more = "space.optim.base_lr={grid: [0.1, 0.3]}"
        sweep = load_sweep(_write(base.parent), [more, "space.method.temperature=null"])
        assert list(sweep.space) == ["optim.base_lr"]
        assert load_sweep(_write(base.parent), ["set.data.limit=7"]).set == {"data.limit": 7}

    def test_another_scheduler_replaces_the_section(self, base: Path) -> None:
        sweep = load_sweep(
            _write(base.parent), ["scheduler.name=hyperband", "scheduler.max_evaluations=4"]
        )
        assert sweep.scheduler.model_dump() == {
            "name": "hyperband",
            "max_evaluations": 4,
            "reduction_factor": 3.0,
        }
        same = load_sweep(_write(base.parent), ["scheduler.name=asha"])
        assert same.scheduler.model_dump()["grace_epochs"] == 1

    def test_all_bad_ones_are_listed(self, base: Path) -> None:
        found = _lines(
            _write(base.parent), ("trainn.epochs=3", "budget", "a=[1", "budget.epochs=-1")
        )
        assert len(found) == 4
        assert found[0] == (
            "override 'trainn.epochs=3': 'trainn' is no setting of a sweep or of a run; did you "
            "mean 'train'?"
        )
        assert found[1] == "override 'budget' is not of the form section.key=value"
        assert found[2].startswith("override 'a=[1': not valid YAML")
        assert found[3] == "budget.epochs: Input should be greater than 0, got -1"


class TestEverythingAtOnce:
    def test_ten_different_mistakes_are_one_answer_of_ten_lines(self, base: Path) -> None:
        path = _write(
            base.parent,
            set={
                "method.tempratur": 0.3,  # 1: no such setting
                "cluster.num_train_workers": 2,
            },
            space={
                "train.global_batch_size": {"grid": [63, 64]},  # 2: does not divide
                "method.queue_length": {"grid": [32, 256]},  # 3: shorter than a step's keys
                "optim.base_lr": {"log_uniform": [0.0, 0.1]},  # 4: logarithm of 0
                "optim.weight_decay": {"uniform": [0.1, 0.01]},  # 5: low above high
                "method.ema_momentum": {"choice": []},  # 6: nothing
                "optim.final_lr_ratio": {"grid": [0], "when": {"method.symmetrc": True}},  # 7
            },
            metric={"name": "eval/knn"},  # 8: no such metric
            budget={"trials": 6, "epochs": 2},
            scheduler={"name": "asha", "grace_epochs": 3},  # 9: beyond the end
            search={"name": "grd"},  # 10: no such search
        )
        found = _lines(path)
        assert len(found) == 10
        for mistake in (
            "method: unknown key 'tempratur'; did you mean 'temperature'?",
            "train.global_batch_size=63 does not divide over cluster.num_train_workers=2",
            "method.queue_length=32 is shorter than the",
            "space.optim.base_lr.log_uniform: a logarithm takes [low, high] with low > 0",
            "space.optim.weight_decay.uniform: takes [low, high] with low < high",
            "space.method.ema_momentum.choice: no values; give at least one",
            "space.optim.final_lr_ratio.when: no setting 'method.symmetrc'; did you mean",
            "metric.name: no metric 'eval/knn'; did you mean 'eval/knn_top1'?",
            "scheduler.grace_epochs=3: trials of 2 epochs end before it",
            "search: got 'grd', allowed: random, grid, optuna; did you mean 'grid'?",
        ):
            assert sum(mistake in line for line in found) == 1, mistake

    def test_ten_others_in_an_otherwise_sound_file(self, base: Path) -> None:
        path = _write(
            base.parent,
            base=["base.yaml", "nowhere.yaml"],  # 1
            set={"seed": 1, "train.epochs.x": 1},  # 2, 3
            space={
                "optim.base_lr": {"uniform": [0.1, 0.2]},  # 4: in a grid
                "name": {"grid": ["a"]},  # 5: the sweep's
                "data.limit": {"grid": ["few"]},  # 6: no number
                "method": {"grid": {"a": {"name": "moco"}, "b": {"name": "mocoo"}}},  # 7
            },
            metric={"also": ["final/linear_top1"]},  # 8: unmeasured
            budget={"epochs": 2, "steps": 5},  # 9: both
            scheduler={"name": "pbt"},  # 10: of what cannot change, and counting in steps
        )
        found = _lines(path)
        for mistake in (
            f"base: {base.parent / 'nowhere.yaml'}: no such file",
            "set.seed: ",
            "train.epochs.x: train.epochs is the value",
            "space.optim.base_lr: a grid search takes listed values",
            "space.name: ",
            "data.limit: Input should be a valid integer, got",
            "method.name: got 'mocoo', allowed",
            "final/linear_top1: final=knn leaves it unmeasured; add linear",
            "budget: give epochs=2 or steps=5, not both",
            "space: name, data.limit, method cannot change during a trial, as pbt requires",
        ):
            assert sum(line.startswith(mistake) for line in found) == 1, mistake

    def test_a_dimension_that_is_wrong_does_not_make_conditions_on_it_wrong(
        self, base: Path
    ) -> None:
        path = _write(
            base.parent,
            space={
                "method.symmetric": {"grd": [True, False]},
                "method.queue_length": {"grid": [256], "when": {"method.symmetric": "maybe"}},
            },
        )
        assert _lines(path) == ["space.method.symmetric: unknown key 'grd'; did you mean 'grid'?"]

    def test_sections_that_are_none_at_all(self, base: Path) -> None:
        found = _lines(_write(base.parent, set=3, space=[1], metric=None), ("data.limit=3",))
        assert [line.split(":")[0] for line in found] == ["set", "space", "metric"]

    def test_without_a_base_nothing_more_can_be_known(self, base: Path) -> None:
        path = base.parent / "no_base.yaml"
        path.write_text("space: {method.tempratur: {grid: [1]}}\n")
        assert _lines(path) == ["base: missing; it has no default"]

    def test_what_loads_can_be_drawn(self, base: Path) -> None:
        assert len(draw(load_sweep(_write(base.parent)))) == 2
