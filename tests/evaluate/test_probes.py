import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from raysl.errors import DataError
from raysl.evaluate.linear import scale_features
from raysl.evaluate.probes import (
    FewShotConfig,
    KnnConfig,
    LbfgsConfig,
    LinearConfig,
    ProbeSets,
    held_out_rows,
    measure_few_shot,
    measure_knn,
    measure_lbfgs,
    measure_linear,
)


def made_up(*, train: int = 300, test: int = 203, classes: int = 4, d: int = 8) -> ProbeSets:
    centers = np.random.default_rng(99).normal(size=(classes, d)) * 1.2
    rng = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        features = (centers[labels] + rng.normal(size=(count, d))) * 30 + 5
        return features.astype(np.float32), labels.astype(np.int64)

    return ProbeSets(*part(train), *part(test))


SETS = made_up()


def knn_by_brute_force(sets: ProbeSets, *, k: int, temperature: float) -> list[int]:
    """All similarities in float64, sorted whole, one test image at a time."""
    bank = sets.train.astype(np.float64)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    found = []
    for row in sets.test.astype(np.float64):
        similarity = bank @ (row / np.linalg.norm(row))
        votes = np.zeros(int(sets.train_labels.max()) + 1)
        for place in np.argsort(-similarity)[:k]:
            votes[sets.train_labels[place]] += np.exp(similarity[place] / temperature)
        found.append(int(votes.argmax()))
    return found


class TestKnn:
    def test_every_k_of_one_pass_is_what_brute_force_gives(self) -> None:
        config = KnnConfig(k=5, also_k=(1, 40))
        found = measure_knn(config, SETS, seed=0, device="cpu")
        assert found.predictions is not None
        expected = {k: knn_by_brute_force(SETS, k=k, temperature=0.07) for k in (1, 5, 40)}
        assert found.predictions.tolist() == expected[5]
        right = {k: np.mean(np.array(v) == SETS.test_labels) for k, v in expected.items()}
        assert found.top1 == right[5]
        assert found.facts == {"top1_of_k_1": right[1], "top1_of_k_40": right[40]}

    def test_in_parts_of_the_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = measure_knn(KnnConfig(), SETS, seed=0, device="cpu")
        monkeypatch.setattr("raysl.evaluate.knn._MOST_SIMILARITIES", 7 * len(SETS.train))
        parts = measure_knn(KnnConfig(), SETS, seed=0, device="cpu")
        assert parts.top1 == whole.top1


def test_class_numbers_with_gaps_are_told_apart_as_those_without() -> None:
    """Ids as large as these would be terabytes of weights, were they counted up to."""
    ids = np.array([17, 150_000, 20_000_000, 1 << 40])
    far = SETS._replace(train_labels=ids[SETS.train_labels], test_labels=ids[SETS.test_labels])
    measures = {
        "knn": lambda sets: measure_knn(KnnConfig(), sets, seed=0, device="cpu"),
        "linear": lambda sets: measure_linear(LinearConfig(epochs=3), sets, seed=0, device="cpu"),
        "lbfgs": lambda sets: measure_lbfgs(LbfgsConfig(), sets, seed=0, device="cpu"),
        "few": lambda sets: measure_few_shot(FewShotConfig(), sets, seed=0, device="cpu"),
    }
    for name, measure in measures.items():
        near, found = measure(SETS), measure(far)
        assert near.predictions is not None, name
        assert found.predictions is not None, name
        assert found.predictions.tolist() == ids[near.predictions].tolist(), name
        assert (found.top1, found.facts) == (near.top1, near.facts), name


@pytest.mark.parametrize("known", [[0] * 6, [0, 1], [0, 1, 2, 3, 4, 5]])
def test_degenerate_labels_raise_nothing(known: list[int]) -> None:
    sets = made_up(train=len(known), test=9)._replace(train_labels=np.array(known))
    for measure, config in (
        (measure_knn, KnnConfig()),
        (measure_linear, LinearConfig(epochs=2)),
        (measure_lbfgs, LbfgsConfig()),
        (measure_few_shot, FewShotConfig(labels_per_class=1)),
    ):
        found = measure(config, sets, seed=0, device="cpu")
        assert found.predictions is not None
        assert set(found.predictions.tolist()) <= set(known)


class TestLinear:
    def test_is_within_three_tenths_of_a_point_of_logistic_regression(self) -> None:
        sets = made_up(train=2000, test=4000)
        train, test = scale_features(sets.train, sets.test)
        theirs = LogisticRegression(C=1.0, max_iter=1000).fit(train, sets.train_labels)
        expected = theirs.score(test, sets.test_labels)
        linear = measure_linear(LinearConfig(epochs=30), sets, seed=0, device="cpu")
        lbfgs = measure_lbfgs(LbfgsConfig(inverse_penalties=(1.0,)), sets, seed=0, device="cpu")
        assert linear.top1 == pytest.approx(expected, abs=0.003)
        assert lbfgs.top1 == pytest.approx(expected, abs=0.003)

    @pytest.mark.parametrize("count", [203, 200, 1])
    def test_every_test_row_counts_once(self, count: int) -> None:
        sets = made_up(test=count)
        for measured in (
            measure_linear(LinearConfig(epochs=1), sets, seed=0, device="cpu"),
            measure_knn(KnnConfig(), sets, seed=0, device="cpu"),
            measure_lbfgs(LbfgsConfig(), sets, seed=0, device="cpu"),
        ):
            assert measured.predictions is not None
            assert measured.predictions.shape == (count,)
            assert measured.top1 == float((measured.predictions == sets.test_labels).mean())

    def test_choices_do_not_look_at_the_test_images(self) -> None:
        other = SETS._replace(test=-SETS.test, test_labels=SETS.test_labels[::-1].copy())
        for measure, config in (
            (measure_linear, LinearConfig(epochs=2)),
            (measure_lbfgs, LbfgsConfig(inverse_penalties=(0.01, 1.0))),
        ):
            first, second = (measure(config, s, seed=1, device="cpu") for s in (SETS, other))
            assert first.facts == second.facts
            assert len(first.facts["held_out_top1"]) > 1

    def test_one_choice_holds_nothing_out(self) -> None:
        for measure, config in (
            (measure_linear, LinearConfig(base_lrs=(0.1,), epochs=2)),
            (measure_lbfgs, LbfgsConfig(inverse_penalties=(1.0,))),
        ):
            assert measure(config, SETS, seed=0, device="cpu").facts["held_out_top1"] == []

    def test_rates_that_all_diverge_are_told(self) -> None:
        config = LinearConfig(base_lrs=(1e38,), epochs=3)
        with pytest.raises(DataError, match=r"base_lr=1e\+38 diverges; set lower linear\.base_lr"):
            measure_linear(config, SETS, seed=0, device="cpu")


class TestHeldOut:
    @pytest.mark.parametrize(
        ("count", "share", "expected"), [(100, 0.1, 10), (2, 0.9, 1), (9, 0.01, 1)]
    )
    def test_rows_are_in_one_part_each(self, count: int, share: float, expected: int) -> None:
        held_out, rest = held_out_rows(count, share=share, seed=0)
        assert len(held_out) == expected
        assert sorted([*held_out.tolist(), *rest.tolist()]) == list(range(count))
        assert not torch.equal(
            held_out_rows(100, share=0.5, seed=0)[0], held_out_rows(100, share=0.5, seed=1)[0]
        )

    def test_one_row_is_too_few(self) -> None:
        with pytest.raises(DataError, match="1 training rows are too few"):
            held_out_rows(1, share=0.1, seed=0)
