from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.config.base import Duration
from raysl.config.yaml_text import to_yaml
from raysl.errors import ConfigError
from raysl.evaluate.registry import FINAL
from raysl.run.recipe import RunConfig
from raysl.sweep.config import Dimension, SweepConfig
from raysl.sweep.space import Candidate, candidate_of, draw, run_config

Make = Callable[..., SweepConfig]
Run = Callable[..., RunConfig[Any]]
TEMPERATURES = {"method.temperature": {"grid": [0.1, 0.2]}}


@pytest.fixture
def run_of(tmp_path: Path, sweep_of: Make) -> Run:
    """Make the run of a sweep's first candidate."""

    def make(**sections: Any) -> RunConfig[Any]:
        sweep = sweep_of(search={"name": "grid"}, **sections)
        return run_config(sweep, draw(sweep)[0], folder=tmp_path)

    return make


class TestDraw:
    def test_a_grid_is_numbered_in_order(self, base: Path, sweep_of: Make) -> None:
        space = TEMPERATURES | {"train.global_batch_size": {"grid": [16, 32]}}
        found = draw(sweep_of(space=space, search={"name": "grid"}))
        assert [candidate.number for candidate in found] == [0, 1, 2, 3]
        assert found[1] == Candidate(
            1,
            {"method.temperature": 0.1, "train.global_batch_size": 32},
            {"method.temperature": 0.1, "train.global_batch_size": 32},
            str(base),
        )

    def test_people_see_labels_and_runs_get_values(self, sweep_of: Make) -> None:
        warmup = {"grid": {"none": {"epochs": 0}, "long": {"epochs": 2}}}
        found = draw(sweep_of(space={"optim.warmup": warmup}, search={"name": "grid"}))
        assert [candidate.params["optim.warmup"] for candidate in found] == ["none", "long"]
        assert found[1].values == {"optim.warmup": {"epochs": 2}}

    def test_repeats_follow_each_other_with_the_seeds_after_the_base_s(
        self, sweep_of: Make
    ) -> None:
        found = draw(sweep_of(space=TEMPERATURES, search={"name": "grid"}, repeats=2))
        seen = [
            (each.number, each.params["method.temperature"], each.params["seed"]) for each in found
        ]
        assert seen == [(0, 0.1, 5), (1, 0.1, 6), (2, 0.2, 5), (3, 0.2, 6)]
        assert all(each.values["seed"] == each.params["seed"] for each in found)

    def test_a_larger_budget_leaves_the_candidates_that_there_were(self, sweep_of: Make) -> None:
        space = {"optim.final_lr_ratio": {"choice": [0, 0.1, 0.2]}, **TEMPERATURES}
        few, many, all_of_them = (
            draw(sweep_of(space=space, budget={"trials": trials}, repeats=2))
            for trials in (2, 5, 50)
        )
        assert (len(few), len(many), len(all_of_them)) == (4, 10, 12)
        assert many[:4] == few
        assert all_of_them[:10] == many

    def test_one_repeat_shows_no_seed(self, sweep_of: Make) -> None:
        assert "seed" not in draw(sweep_of(space=TEMPERATURES, search={"name": "grid"}))[0].params

    def test_several_bases_are_a_parameter_and_no_setting(
        self, base: Path, tmp_path: Path, sweep_of: Make
    ) -> None:
        other = tmp_path / "other.yaml"
        other.write_text(base.read_text())
        found = draw(sweep_of(base=[str(base), str(other)], search={"name": "grid"}, repeats=2))
        assert [(each.params["config"], each.base) for each in found[::2]] == [
            ("base", str(base)),
            ("other", str(other)),
        ]
        assert len(found) == 4
        assert all("config" not in each.values for each in found)

    def test_a_random_search_draws_as_many_as_the_budget_says(self, sweep_of: Make) -> None:
        space = {"optim.base_lr": {"log_uniform": [1e-3, 1e-1]}}
        found = draw(sweep_of(space=space, budget={"trials": 7}))
        assert len(found) == len({each.params["optim.base_lr"] for each in found}) == 7
        assert all(1e-3 <= each.params["optim.base_lr"] <= 1e-1 for each in found)

    def test_the_sweep_s_seed_draws_and_leaves_the_runs_seed_alone(
        self, tmp_path: Path, sweep_of: Make
    ) -> None:
        space = {"optim.base_lr": {"log_uniform": [1e-3, 1e-1]}}
        one, two = (sweep_of(space=space, budget={"trials": 3}, seed=seed) for seed in (0, 1))
        assert draw(one) == draw(one)
        assert draw(one) != draw(two)
        assert run_config(two, draw(two)[0], folder=tmp_path).seed == 5

    def test_optuna_has_no_candidates_beforehand(self, sweep_of: Make) -> None:
        found = draw(sweep_of(space=TEMPERATURES, search={"name": "optuna"}, budget={"trials": 5}))
        assert found == []

    def test_a_space_that_is_not_sound_lists_why(self, sweep_of: Make) -> None:
        space = {"seed": {"grid": [1]}, "optim.base_lr": {"uniform": [0.1, 0.2]}}
        with pytest.raises(ConfigError, match=r"sweep s: 2 problems\n  space\.seed: .*\n  budget"):
            draw(sweep_of(space=space))


class TestCandidateOf:
    def test_is_asked_for_each_dimension_that_exists_once_its_condition_is_known(
        self, sweep_of: Make
    ) -> None:
        space = {
            "method.queue_length": {"grid": [64, 128], "when": {"method.symmetric": True}},
            "method.symmetric": {"choice": [True, False]},
        }
        sweep = sweep_of(space=space, search={"name": "optuna"}, budget={"trials": 5})
        asked: list[str] = []

        def pick(name: str, dimension: Dimension) -> Any:
            asked.append(name)
            return dimension.labels()[-1]

        candidate = candidate_of(sweep, 7, pick)
        assert asked == ["method.symmetric"]
        assert candidate.params == candidate.values == {"method.symmetric": False}
        assert candidate.number == 7

    def test_gives_the_seed_of_its_repeat(self, sweep_of: Make) -> None:
        sweep = sweep_of(space=TEMPERATURES, repeats=3)
        candidate = candidate_of(sweep, 0, lambda name, dimension: 0.1, repeat=2)
        assert candidate.values == {"method.temperature": 0.1, "seed": 7}


class TestRunConfig:
    def test_is_the_base_with_set_and_then_the_candidate(self, run_of: Run) -> None:
        run = run_of(set={"data.limit": 100}, space=TEMPERATURES)
        assert run.method.temperature == 0.1
        assert run.data.limit == 100
        assert run.method.queue_length == 256

    def test_its_folder_is_named_after_its_number(self, tmp_path: Path, sweep_of: Make) -> None:
        sweep = sweep_of(space=TEMPERATURES, search={"name": "grid"})
        run = run_config(sweep, draw(sweep)[1], folder=tmp_path / "s")
        assert Path(run.output_dir) / run.name == tmp_path / "s" / "trials" / "0001"

    def test_a_section_is_set_before_what_is_in_it(self, run_of: Run) -> None:
        run = run_of(
            space={
                "method.temperature": {"grid": [0.7]},
                "method": {"grid": {"simclr": {"name": "simclr", "temperature": 0.1}}},
            }
        )
        assert (run.method.name, run.method.temperature) == ("simclr", 0.7)

    def test_the_budget_says_how_long_a_trial_is(self, run_of: Run) -> None:
        run = run_of(space=TEMPERATURES, budget={"steps": 30})
        assert (run.train.steps, run.train.epochs) == (30, None)
        run = run_of(space=TEMPERATURES, budget={"epochs": 2.5})
        assert (run.train.steps, run.train.epochs) == (None, 2.5)
        assert run_of(space=TEMPERATURES).train.epochs == 4

    def test_the_sweep_tracks_and_says_what_is_measured_at_the_end(self, run_of: Run) -> None:
        run = run_of(space=TEMPERATURES, track={"experiment": "mine"})
        assert not run.track.mlflow
        assert run.track.experiment == "mine"
        assert run.evaluate.final == ("knn",)
        assert not run.evaluate.pixel_baseline
        assert run.evaluate.online == "blocking"  # schedulers decide by each value at its step
        assert run_of(space=TEMPERATURES, final="full").evaluate.final == FINAL
        assert run_of(space=TEMPERATURES, final=["linear"]).evaluate.final == ("linear",)

    @pytest.mark.parametrize("final", ["knn", ["knn", "finetune"]])
    def test_a_trial_is_fine_tuned_by_the_old_words_and_by_name(
        self, run_of: Run, final: Any
    ) -> None:
        tuned = {"evaluate.finetune.epochs": 3, "evaluate.finetune.label_fraction": 0.5}
        run = run_of(space=TEMPERATURES, final=final, set=tuned)
        assert run.evaluate.final == ("knn", "finetune")
        assert (run.evaluate.finetune.epochs, run.evaluate.finetune.label_fraction) == (3, 0.5)

    @pytest.mark.parametrize(
        ("own", "expected"),
        [
            (None, Duration(epochs=1.0)),  # the default of 5 epochs misses the first rung
            ({"epochs": 0.5}, Duration(epochs=0.5)),
            ({"epochs": 3}, Duration(epochs=1.0)),
            ({"fraction": 0.25}, Duration(fraction=0.25)),  # of 4 epochs
            ({"fraction": 0.5}, Duration(epochs=1.0)),
            ({"steps": 7}, Duration(epochs=1.0)),
        ],
    )
    def test_asha_is_told_at_its_rungs(
        self,
        own: Any,
        expected: Duration,
        base: Path,
        run_of: Run,
    ) -> None:
        if own is not None:
            base.write_text(base.read_text() + to_yaml({"evaluate": {"every": own}}))
        run = run_of(space=TEMPERATURES, scheduler={"name": "asha", "grace_epochs": 1})
        assert run.evaluate.every == expected
        assert run.train.checkpoint_every == Duration(epochs=1.0)

    def test_hyperband_is_told_evenly_and_can_pause_there(self, run_of: Run) -> None:
        run = run_of(space=TEMPERATURES, scheduler={"name": "hyperband", "max_evaluations": 4})
        assert run.evaluate.every == run.train.checkpoint_every == Duration(fraction=0.25)

    def test_population_based_training_is_told_and_saved_when_it_exchanges(
        self, run_of: Run
    ) -> None:
        run = run_of(space=TEMPERATURES, scheduler={"name": "pbt", "perturb_every_epochs": 0.5})
        assert run.evaluate.every == run.train.checkpoint_every == Duration(epochs=0.5)
        assert run.train.keep_checkpoints == 2

    def test_without_a_scheduler_the_base_says_when_to_evaluate(
        self, base: Path, run_of: Run
    ) -> None:
        base.write_text(base.read_text() + to_yaml({"evaluate": {"every": None}}))
        assert run_of(space=TEMPERATURES).evaluate.every == Duration(fraction=1.0)

    def test_a_bad_one_lists_every_bad_key(self, tmp_path: Path, sweep_of: Make) -> None:
        sweep = sweep_of(set={"optim.base_rl": 1, "data.limit": "x"})
        with pytest.raises(ConfigError, match=r"base\.yaml, trial 0000: 2 bad keys"):
            run_config(sweep, draw(sweep)[0], folder=tmp_path)
