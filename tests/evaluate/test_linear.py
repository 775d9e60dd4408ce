from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from raysl.errors import DataError
from raysl.evaluate.linear import Features, Labels, few_shot_rows, scale_features
from raysl.evaluate.probes import (
    FewShotConfig,
    LbfgsConfig,
    ProbeSets,
    measure_few_shot,
    measure_lbfgs,
)


def clusters(n: int, *, seed: int, classes: int = 3, d: int = 5) -> tuple[Features, Labels]:
    centers = np.random.default_rng(99).normal(size=(classes, d)) * 1.5
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = (centers[labels] + rng.normal(size=(n, d))) * 20 + 7
    return features.astype(np.float32), labels.astype(np.int64)


TRAIN, TEST = clusters(90, seed=0), clusters(60, seed=1)


def linear_accuracy(*arrays: Any, inverse_penalty: float = 1.0) -> float:
    config = LbfgsConfig(inverse_penalties=(inverse_penalty,))
    return measure_lbfgs(config, ProbeSets(*arrays), seed=0, device="cpu").top1


def accuracy_of_scikit_learn(
    train: tuple[Features, Labels], test: tuple[Features, Labels], inverse_penalty: float
) -> float:
    classifier = LogisticRegression(C=inverse_penalty, max_iter=1000)
    return float(classifier.fit(*train).score(*test))


class TestScaled:
    def test_takes_off_each_mean_and_divides_by_one_number_of_the_training_images(self) -> None:
        train = np.array([[0, 10], [4, 10], [2, 16], [2, 4]], dtype=np.float32)
        test = np.array([[2, 10], [7, 10]], dtype=np.float32)
        one_number = np.sqrt((0 + 4 + 4 + 0 + 0 + 36 + 36 + 0) / 8)
        found = scale_features(train, test)
        np.testing.assert_allclose(found[0], (train - [2, 10]) / one_number, rtol=1e-6)
        np.testing.assert_allclose(found[1], (test - [2, 10]) / one_number, rtol=1e-6)

    def test_features_that_are_all_the_same_do_not_divide_by_zero(self) -> None:
        train, test = scale_features(np.full((4, 3), 5, np.float32), np.full((2, 3), 6, np.float32))
        np.testing.assert_array_equal(train, 0)
        np.testing.assert_array_equal(test, 1)


class TestLinear:
    @pytest.mark.parametrize("inverse_penalty", [0.01, 1.0, 100.0])
    def test_equals_scikit_learn_called_directly(self, inverse_penalty: float) -> None:
        train, test = scale_features(TRAIN[0], TEST[0])
        expected = accuracy_of_scikit_learn((train, TRAIN[1]), (test, TEST[1]), inverse_penalty)
        found = linear_accuracy(*TRAIN, *TEST, inverse_penalty=inverse_penalty)
        assert found == pytest.approx(expected)
        assert 0.5 < found < 1.0

    def test_does_not_depend_on_the_unit_or_the_origin_of_the_features(self) -> None:
        moved = linear_accuracy(TRAIN[0] * 500 + 30, TRAIN[1], TEST[0] * 500 + 30, TEST[1])
        assert moved == pytest.approx(linear_accuracy(*TRAIN, *TEST))

    def test_a_feature_that_is_always_the_same_does_no_harm(self) -> None:
        dead = [np.column_stack([x, np.full(len(x), 3, np.float32)]) for x in (TRAIN[0], TEST[0])]
        assert linear_accuracy(dead[0], TRAIN[1], dead[1], TEST[1]) == pytest.approx(
            linear_accuracy(*TRAIN, *TEST), abs=0.02
        )


class TestFewShotRows:
    def test_draws_as_many_of_each_class_and_none_twice(self) -> None:
        labels = np.array([2] * 5 + [0] * 40 + [7] * 9)
        rows = few_shot_rows(labels, labels_per_class=4, seed=0, draw=0)
        assert len(set(rows.tolist())) == 12
        assert sorted(labels[rows].tolist()) == [0] * 4 + [2] * 4 + [7] * 4

    def test_is_a_function_of_seed_and_draw(self) -> None:
        def rows(seed: int, draw: int) -> tuple[int, ...]:
            return tuple(few_shot_rows(TRAIN[1], labels_per_class=5, seed=seed, draw=draw).tolist())

        assert rows(0, 1) == rows(0, 1)
        assert len({rows(seed, draw) for seed in range(3) for draw in range(3)}) == 9

    def test_may_take_all(self) -> None:
        rows = few_shot_rows(np.array([0, 1, 0, 1]), labels_per_class=2, seed=0, draw=0)
        assert sorted(rows.tolist()) == [0, 1, 2, 3]

    def test_too_few_images_of_a_class_are_named(self) -> None:
        with pytest.raises(DataError) as caught:
            few_shot_rows(np.array([0, 0, 0, 4, 4]), labels_per_class=3, seed=0, draw=0)
        assert str(caught.value) == (
            "class 4 has 2 labelled images, fewer than few_shot.labels_per_class=3; lower it"
        )


class TestFewShot:
    def test_equals_scikit_learn_called_directly(self) -> None:
        train, test = scale_features(
            TRAIN[0], TEST[0]
        )  # by all images: the unlabelled are there too
        config = FewShotConfig(labels_per_class=3, inverse_penalty=10.0)
        for draw in range(4):
            rows = few_shot_rows(TRAIN[1], labels_per_class=3, seed=0, draw=draw)
            few = train[rows], TRAIN[1][rows]
            expected = accuracy_of_scikit_learn(few, (test, TEST[1]), 10.0)
            found = measure_few_shot(config, ProbeSets(*TRAIN, *TEST), seed=draw, device="cpu")
            assert found.top1 == pytest.approx(expected)
