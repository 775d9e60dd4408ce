"""Configurations and run folders of version 0.1 mean what they meant."""

from typing import Any

import pytest

from raysl.errors import ConfigError
from raysl.evaluate.old_keys import new_keys, rename_old_keys, resolve_final
from raysl.evaluate.registry import FINAL
from raysl.run.recipe import RunConfig, drop_idle, run_from_user, run_from_values

BASE: dict[str, Any] = {
    "name": "a",
    "data": {"source": "photos", "views": {"recipe": "simclr", "size_px": 32}},
    "method": {"name": "simclr", "projection_layers": 3},
    "train": {"epochs": 1, "global_batch_size": 4},
}
# Section evaluate, as a run folder of version 0.1 holds it.
DUMP: dict[str, Any] = {
    "every": {"steps": None, "epochs": 5.0, "fraction": None},
    "final": "full",
    "knn_k": 20,
    "knn_temperature": 0.07,
    "few_shot_labels": 5,
    "few_shot_draws": 5,
    "inverse_penalty": 1.0,
    "pixel_baseline": True,
    "finetune": None,
}
TUNED = {
    "label_fraction": 0.1,
    "head_layers": 0,
    "epochs": 30,
    "batch_size": 256,
    "base_lr": 0.05,
    "sgd_momentum": 0.9,
    "weight_decay": 0.0,
    "min_scale": 0.08,
    "flip_prob": 0.5,
    "seed": 7,
}


def run(**evaluate: Any) -> RunConfig[Any]:
    return run_from_values(BASE | {"evaluate": evaluate}, where="a test")


class TestRenamed:
    def test_each_key_sets_what_it_set(self) -> None:
        numbers = {"knn_k": 3, "knn_temperature": 0.5, "few_shot_labels": 2, "few_shot_draws": 4}
        evaluate = run(**numbers, inverse_penalty=0.25).evaluate
        assert (evaluate.knn.k, evaluate.knn.temperature) == (3, 0.5)
        assert (evaluate.few_shot.labels_per_class, evaluate.few_shot.draws) == (2, 4)
        assert evaluate.few_shot.inverse_penalty == 0.25
        assert evaluate.linear_lbfgs.inverse_penalties == (0.25,)

    def test_a_layer_on_top_wins_whichever_name_it_uses(self) -> None:
        below = drop_idle({}, BASE | {"evaluate": {"knn_k": 3}}, ["evaluate.knn_k"])
        new = {**below, "evaluate": {**below["evaluate"], "knn": {"k": 5}}}
        assert (
            run_from_user(drop_idle(below, new, ["evaluate.knn.k"]), where="x").evaluate.knn.k == 5
        )
        old = {**below, "evaluate": {**below["evaluate"], "knn_k": 7}}
        assert (
            run_from_user(drop_idle(below, old, ["evaluate.knn_k"]), where="x").evaluate.knn.k == 7
        )

    def test_both_names_in_one_layer_are_refused_as_an_unknown_key(self) -> None:
        both = {"evaluate": {"knn_k": 3, "knn": {"k": 4}}}
        assert rename_old_keys(both, ["evaluate.knn_k", "evaluate.knn.k"]) == both

    def test_a_key_that_an_override_gives_stands_for_its_new_names(self) -> None:
        assert new_keys("evaluate.few_shot_draws") == ["evaluate.few_shot.draws"]
        assert new_keys("optim.base_lr") == ["optim.base_lr"]


class TestFinal:
    def test_full_is_the_default(self) -> None:
        assert run(final="full").evaluate == run().evaluate
        assert run().evaluate.final == FINAL

    def test_knn_measures_the_trained_encoder_alone(self) -> None:
        for given in ({}, {"pixel_baseline": True}, {"pixel_baseline": False}):
            evaluate = run(final="knn", **given).evaluate
            assert evaluate.final == ("knn",)
            assert evaluate.is_quick

    @pytest.mark.parametrize(("word", "probes"), [("knn", ("knn",)), ("full", FINAL)])
    def test_a_section_fine_tunes_with_a_tenth_of_the_labels(
        self, word: str, probes: tuple[str, ...]
    ) -> None:
        evaluate = run(final=word, finetune={"head_layers": 1}).evaluate
        assert (evaluate.probes, evaluate.trained) == (probes, ("finetune",))
        assert (evaluate.finetune.label_fraction, evaluate.finetune.head_layers) == (0.1, 1)
        assert evaluate.seeds == (0,)
        assert run(finetune={}).evaluate.final == (*FINAL, "finetune")

    def test_a_list_says_itself_what_is_measured(self) -> None:
        evaluate = run(final=["knn", "finetune"], finetune={"epochs": 3}).evaluate
        assert (evaluate.finetune.label_fraction, evaluate.seeds) == (1.0, (0, 1, 2))
        assert run(final=["knn", "finetune"], finetune=None).evaluate.final == ("knn",)

    def test_other_words_are_refused_with_the_most_similar_protocol(self) -> None:
        assert resolve_final({"evaluate": {"final": "linear"}})["evaluate"]["final"] == ["linear"]
        with pytest.raises(ConfigError, match="mean 'knn'"):
            run(final="knnn")


class TestRunFolders:
    def test_are_read(self) -> None:
        assert run(**DUMP).evaluate == run(pixel_baseline=True).evaluate

    def test_with_fine_tuning_too(self) -> None:
        evaluate = run(**DUMP | {"final": "knn", "finetune": TUNED}).evaluate
        assert (evaluate.final, evaluate.seeds) == (("knn", "finetune"), (7,))
        assert evaluate.finetune.label_fraction == 0.1

    def test_of_now_are_not_taken_for_old_ones(self) -> None:
        config = run()
        assert run_from_values(config.model_dump(mode="json"), where="x") == config
