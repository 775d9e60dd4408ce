from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import ConfigError, DataError
from raysl.run.recipe import RunConfig
from raysl.sweep.check import check
from raysl.sweep.config import SweepConfig
from raysl.sweep.problems import space_problems
from raysl.sweep.space import draw, samples

Make = Callable[..., SweepConfig]
GRID = {"name": "grid"}
TEMPERATURES = {"method.temperature": {"grid": [0.1, 0.2]}}


def problems_of(sweep: SweepConfig, **more: Any) -> list[str]:
    """Return the lines of the error that checking a sweep raises, without the heading."""
    with pytest.raises(ConfigError) as caught:
        check(sweep, samples(sweep), folder=Path("runs"), **more)
    heading, *lines = str(caught.value).split("\n")
    assert heading == f"sweep s: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return [line.removeprefix("  ") for line in lines]


class TestRuns:
    def test_a_sound_sweep_gives_its_runs(self, sweep_of: Make) -> None:
        sweep = sweep_of(space=TEMPERATURES, search=GRID, repeats=2)
        runs = check(sweep, draw(sweep), folder=Path("runs"))
        assert [(run.method.temperature, run.seed) for run in runs] == [
            (0.1, 5),
            (0.1, 6),
            (0.2, 5),
            (0.2, 6),
        ]

    def test_a_problem_comes_once_with_how_many_have_it_and_one_of_them(
        self, sweep_of: Make
    ) -> None:
        space = TEMPERATURES | {"train.global_batch_size": {"grid": [64, 63, 65, 66]}}
        sweep = sweep_of(space=space, search=GRID, set={"cluster.num_train_workers": 2})
        assert problems_of(sweep) == [
            "top level: train.global_batch_size=63 does not divide over "
            "cluster.num_train_workers=2; use 62 or 64 (4 of 8 candidates, such as "
            "method.temperature=0.1 train.global_batch_size=63)"
        ]

    def test_all_combinations_that_cannot_be_are_said_of_one_run(self, sweep_of: Make) -> None:
        settings = {"train.global_batch_size": 63, "cluster.num_train_workers": 2}
        found = problems_of(sweep_of(set=settings | {"method.queue_length": 32}))
        assert len(found) == 2
        assert "does not divide over" in found[0]
        assert "method.queue_length=32 is shorter than the 63 keys" in found[1]

    def test_trials_have_a_fixed_number_of_workers(self, sweep_of: Make) -> None:
        found = problems_of(sweep_of(set={"cluster.num_train_workers": {"min": 1, "max": 2}}))
        assert len(found) == 1
        assert found[0].startswith("cluster.num_train_workers: trials share the cluster")

    def test_a_bad_key_does_not_hide_a_combination(self, sweep_of: Make) -> None:
        settings = {"method.queue_length": 32, "optim.base_rl": 1, "data.limit": "many"}
        found = problems_of(sweep_of(set=settings))
        assert len(found) == 3
        assert any("did you mean 'base_lr'?" in line for line in found)
        assert any(line.startswith("data.limit: ") for line in found)
        assert any("method.queue_length=32" in line for line in found)

    def test_a_combination_with_a_value_that_is_bad_itself_is_not_guessed_at(
        self, sweep_of: Make
    ) -> None:
        settings = {"train.global_batch_size": "large", "cluster.num_train_workers": 3}
        assert len(problems_of(sweep_of(set=settings))) == 1

    def test_an_unknown_method_does_not_hide_the_rest(self, sweep_of: Make) -> None:
        found = problems_of(sweep_of(set={"method.name": "mocoo", "optim.base_rl": 1}))
        assert len(found) == 2
        assert found[0].startswith("method.name: got 'mocoo', allowed: ")

    def test_a_setting_that_runs_through_a_value_is_named(self, sweep_of: Make) -> None:
        assert problems_of(sweep_of(set={"train.epochs.x": 1})) == [
            "train.epochs.x: train.epochs is the value 4, not a section"
        ]

    def test_the_ends_of_a_range_are_tried_though_no_draw_comes_near(self, sweep_of: Make) -> None:
        space = {"method.temperature": {"uniform": [-0.0001, 100]}}
        found = problems_of(sweep_of(space=space, budget={"trials": 2}))
        assert found == [
            "method.temperature: Input should be greater than 0, got -0.0001 (such as "
            "method.temperature=-0.0001)"
        ]

    def test_what_optuna_could_suggest_is_tried(self, sweep_of: Make) -> None:
        space = {
            "method": {"choice": {"good": {"name": "simclr"}, "bad": {"name": "simclrr"}}},
            "optim.base_lr": {"log_uniform": [1e-3, 1e-1]},
        }
        sweep = sweep_of(space=space, search={"name": "optuna"}, budget={"trials": 4})
        with pytest.raises(ConfigError, match=r"method\.name: got 'simclrr'"):
            check(sweep, draw(sweep), folder=Path("runs"))

    def test_images_are_looked_at_where_asked(self, sweep_of: Make) -> None:
        def check_run(run: RunConfig[Any]) -> None:
            if run.train.global_batch_size > 100:
                raise DataError(f"the batch of {run.train.global_batch_size} is too large")

        space = {"train.global_batch_size": {"grid": [64, 128, 256]}}
        assert problems_of(sweep_of(space=space, search=GRID), check_run=check_run) == [
            "the batch of 128 is too large (2 of 3 candidates, such as train.global_batch_size=128)"
        ]


class TestSchedulersAndMetrics:
    @pytest.mark.parametrize(
        ("sections", "problem"),
        [
            (
                {"scheduler": {"name": "asha", "grace_epochs": 4}},
                "scheduler.grace_epochs=4: trials of 4 epochs end before it; lower it, or raise "
                "budget.epochs",
            ),
            (
                {"scheduler": {"name": "asha"}, "budget": {"steps": 100}},
                "scheduler asha counts in epochs; set budget.epochs, not steps",
            ),
            (
                {"scheduler": {"name": "asha"}, "set": {"evaluate.every": {"epochs": 2}}},
                "evaluate.every={'epochs': 2}: scheduler asha decides every 1 epochs, and needs "
                "an evaluation then; leave it out",
            ),
            (
                {"scheduler": {"name": "hyperband"}, "set": {"evaluate.every": {"epochs": 2}}},
                "evaluate.every: hyperband spaces evaluations by scheduler.max_evaluations; leave "
                "it out",
            ),
            (
                {"set": {"evaluate.every": None}},
                "evaluate.every=null: a sweep reads its metric from evaluations; set an interval",
            ),
            (
                {"metric": {"name": "simclr/uniformity"}},
                "metric.name=simclr/uniformity: method moco does not measure it",
            ),
            (
                {"metric": {"name": "final/finetune_top1"}},
                "final/finetune_top1: final=knn leaves it unmeasured; add finetune to final",
            ),
            (
                {"metric": {"also": ["final/linear_top1"]}, "final": ["knn", "few_shot"]},
                "final/linear_top1: final=[knn, few_shot] leaves it unmeasured; add linear to "
                "final",
            ),
            (
                {"metric": {"also": ["final/untrained_knn_top1"]}},
                "final/untrained_knn_top1: set evaluate.untrained_baseline=true, which final=knn "
                "leaves out",
            ),
        ],
    )
    def test_what_does_not_fit_a_run_is_said(
        self, sections: dict[str, Any], problem: str, sweep_of: Make
    ) -> None:
        found = problems_of(sweep_of(space=TEMPERATURES, search=GRID, **sections))
        assert found == [f"{problem} (all 2 candidates)"]

    def test_a_metric_of_the_method_fits(self, sweep_of: Make) -> None:
        sweep = sweep_of(metric={"name": "moco/uniformity", "mode": "min"})
        assert len(check(sweep, draw(sweep), folder=Path("runs"))) == 1


class TestSpaceProblems:
    @pytest.mark.parametrize(
        ("sections", "problem"),
        [
            (
                {"set": {"seed": 1}},
                "set.seed: is the sweep's own setting; set repeats, which trains each candidate "
                "with several seeds, instead",
            ),
            (
                {"space": {"track.mlflow": {"grid": [True]}}},
                "space.track.mlflow: is the sweep's own setting; set track instead",
            ),
            (
                {"space": {"config": {"grid": [1]}}},
                "space.config: tells several base files apart; list them in base",
            ),
            (
                {"set": {"optim.": 1}},
                "set.optim.: is not of the form section.key",
            ),
            (
                {"space": TEMPERATURES, "set": {"method.temperature": 1.0}},
                "set.method.temperature: the space varies it; drop one of the two",
            ),
            (
                {"budget": {"epochs": 1, "steps": 3}},
                "budget: give epochs=1 or steps=3, not both",
            ),
            (
                {"budget": {"epochs": 1}, "space": {"train.epochs": {"grid": [1, 2]}}},
                "train.epochs: budget.epochs already says how long a trial is; drop one of the two",
            ),
            (
                {"space": {"optim.base_lr": {"uniform": [0.1, 0.2]}}},
                "budget.trials: missing; search random needs it to know when to end",
            ),
            (
                {"search": {"name": "optuna"}, "space": TEMPERATURES},
                "budget.trials: missing; search optuna needs it to know when to end",
            ),
            (
                {"search": GRID, "space": {"optim.base_lr": {"uniform": [0.1, 0.2]}}},
                "space.optim.base_lr: a grid search takes listed values; got a range (uniform). "
                "List some, or set search.name=random",
            ),
            (
                {
                    "search": {"name": "optuna"},
                    "budget": {"trials": 3},
                    "space": TEMPERATURES,
                    "exclude": [{"method.temperature": 0.1}],
                },
                "exclude: optuna would suggest excluded combinations; use when, or another search",
            ),
            (
                {"search": GRID, "space": TEMPERATURES, "budget": {"trials": 1}},
                "budget.trials=1 is less than the 2 combinations of the grid; leave it out, or set "
                "search.name=random, which spreads over them evenly",
            ),
            (
                {"budget": {"trials": 6000}, "repeats": 2},
                "12,000 trials; a sweep has at most 10,000",
            ),
            (
                {"metric": {"name": "eval/knn"}},
                "metric.name: no metric 'eval/knn'; did you mean 'eval/knn_top1'?",
            ),
            (
                {"metric": {"also": ["accuracy"]}},
                "metric.also: got 'accuracy'; a metric is section/name, such as eval/knn_top1",
            ),
            (
                {"metric": {"name": "final/knn_top1"}, "scheduler": {"name": "asha"}},
                "metric.name=final/knn_top1 is measured at the end only; scheduler asha needs one "
                "that is measured during training, such as eval/knn_top1",
            ),
            (
                {
                    "scheduler": {
                        "name": "hyperband",
                        "max_evaluations": 2,
                        "reduction_factor": 3.0,
                    }
                },
                "scheduler: hyperband with max_evaluations=2 and reduction_factor=3 compares "
                "no trials; raise max_evaluations to reduction_factor or more",
            ),
        ],
    )
    def test_a_mistake_is_named_with_what_to_do(
        self, sections: dict[str, Any], problem: str, sweep_of: Make
    ) -> None:
        assert space_problems(sweep_of(**sections)) == [problem]

    def test_bases_that_are_not_there_or_have_one_name(
        self, base: Path, tmp_path: Path, sweep_of: Make
    ) -> None:
        twin = tmp_path / "more" / "base.yaml"
        twin.parent.mkdir()
        twin.write_text(base.read_text())
        missing = tmp_path / "nowhere.yaml"
        found = space_problems(sweep_of(base=[str(base), str(twin), str(missing)]))
        assert found == [
            f"base: {base} and {twin} have the same name 'base'; rename one",
            f"base: {missing}: no such file",
        ]

    @pytest.mark.parametrize(
        ("when", "problem"),
        [
            ({"method.tempratur": 1}, "no setting 'method.tempratur'; did you mean 'method.temper"),
            ({"method.symmetric": "yes"}, "is never met; the dimension would never be tried"),
            ({"train.epochs": 5}, "is never met; the dimension would never be tried"),
            ({"a.listed": [1, 4]}, "a.listed is never 4; its values: 1, 2"),
            ({"a.range": 1}, "a.range is drawn from a range; a condition can ask about listed"),
        ],
    )
    def test_a_condition_that_cannot_be_answered_or_met(
        self, when: dict[str, Any], problem: str, sweep_of: Make
    ) -> None:
        space = {
            "method.ema_momentum": {"grid": [0.9], "when": when},
            "a.listed": {"grid": [1, 2]},
            "a.range": {"uniform": [0, 1]},
        }
        found = space_problems(sweep_of(space=space, budget={"trials": 3}))
        assert len(found) == 1
        assert found[0].startswith(f"space.method.ema_momentum.when: {problem}")

    def test_conditions_in_a_circle(self, sweep_of: Make) -> None:
        space = {
            "a.x": {"grid": [1], "when": {"a.y": 1}},
            "a.y": {"grid": [1], "when": {"a.x": 1}},
        }
        assert space_problems(sweep_of(space=space)) == [
            "space: the conditions of a.x, a.y depend on each other"
        ]

    @pytest.mark.parametrize(
        ("exclude", "problem"),
        [
            ({}, "exclude.0: names no setting, and would exclude everything"),
            ({"method.tempratur": 1}, "exclude.0: no setting 'method.tempratur'; did you mean"),
            (
                {"method.temperature": 3},
                "exclude.0: method.temperature is never 3; its values: 0.1",
            ),
            ({"method.temperature": [0.1, 0.2]}, "exclude: leaves nothing to try"),
        ],
    )
    def test_what_is_left_out_has_to_be_there_and_not_everything(
        self, exclude: dict[str, Any], problem: str, sweep_of: Make
    ) -> None:
        (found,) = space_problems(sweep_of(space=TEMPERATURES, exclude=[exclude]))
        assert found.startswith(problem)

    def test_population_based_training_changes_only_what_can_change(self, sweep_of: Make) -> None:
        space = {
            "method.temperature": {"uniform": [0.1, 0.3]},
            "optim.base_lr": {"log_uniform": [1e-3, 1e-1]},
            "method.queue_length": {"grid": [64, 128]},
        }
        sections = {"scheduler": {"name": "pbt"}, "budget": {"trials": 1}, "repeats": 2}
        found = space_problems(sweep_of(space=space, **sections))
        assert [line.split(" ")[0] for line in found] == [
            "space:",
            "repeats=2:",
            "budget.trials=1:",
        ]
        assert found[0].startswith("space: method.queue_length cannot change during")
