import math

import pytest
import torch
from torch import Tensor

from raysl.errors import ShapeError
from raysl.evaluate.probes import KnnConfig, ProbeSets, measure_knn


def knn_accuracy(*sets: Tensor, k: int, temperature: float) -> float:
    config = KnnConfig(k=k, also_k=(), temperature=temperature)
    arrays = ProbeSets(*(each.numpy() for each in sets))
    return measure_knn(config, arrays, seed=0, device="cpu").top1


def clusters(n: int, *, seed: int, classes: int = 4, d: int = 6) -> tuple[Tensor, Tensor]:
    """Overlapping classes, so that neighbours disagree."""
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    lengths = torch.rand(n, 1, generator=generator) * 5 + 0.1
    features = (centers[labels] + 1.2 * torch.randn(n, d, generator=generator)) * lengths
    return features, labels


def knn_by_hand(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int,
    temperature: float,
) -> float:
    """Section 3.4 as loops in float64: sort all neighbours, add the votes of the first k."""
    right = 0
    for row, label in zip(test.double(), test_labels.tolist(), strict=True):
        found = [
            (float(torch.dot(row, other) / (row.norm() * other.norm())), int(other_label))
            for other, other_label in zip(train.double(), train_labels, strict=True)
        ]
        votes: dict[int, float] = {}
        for similarity, voted in sorted(found, reverse=True)[:k]:
            votes[voted] = votes.get(voted, 0.0) + math.exp(similarity / temperature)
        right += max(votes, key=lambda voted: votes[voted]) == label
    return right / len(test)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_vote_counted_by_hand(k: int, temperature: float) -> None:
    train, test = clusters(60, seed=0), clusters(40, seed=1)
    found = knn_accuracy(*train, *test, k=k, temperature=temperature)
    assert found == pytest.approx(knn_by_hand(*train, *test, k, temperature))
    assert 0.3 < found < 1.0


@pytest.mark.parametrize("k", [60, 61, 10_000])
def test_more_neighbours_than_images_means_all_of_them(k: int) -> None:
    train, test = clusters(60, seed=0), clusters(40, seed=1)
    found = knn_accuracy(*train, *test, k=k, temperature=0.1)
    assert found == pytest.approx(knn_by_hand(*train, *test, 60, 0.1))


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 2500])
def test_every_test_row_counts(n: int) -> None:
    """Also beyond the rows that are compared at once: only the last one is right, or wrong."""
    train, labels = torch.eye(2), torch.tensor([0, 1])
    test = torch.tensor([[1.0, 0.2]]).expand(n, 2)
    wrong = torch.ones(n, dtype=torch.long)
    wrong[-1] = 0
    assert knn_accuracy(train, labels, test, wrong, k=1, temperature=0.1) == pytest.approx(1 / n)
    assert knn_accuracy(train, labels, test, 1 - wrong, k=1, temperature=0.1) == pytest.approx(
        (n - 1) / n
    )


def test_one_near_neighbour_outvotes_two_far_ones_if_the_temperature_is_low() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, test, truth = torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), torch.tensor([0])
    # Votes: exp(1 / t) against 2 exp(0.8 / t); equal at t = 0.2 / log 2 = 0.29.
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=0.28) == 1.0
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=0.30) == 0.0


def test_a_very_low_temperature_does_not_overflow() -> None:
    train, test = clusters(60, seed=0), clusters(40, seed=1)
    lowest = knn_accuracy(*train, *test, k=20, temperature=1e-4)
    assert lowest == knn_accuracy(*train, *test, k=1, temperature=1.0)


def test_a_class_that_only_the_test_images_have_is_never_right() -> None:
    train, test = (torch.eye(2), torch.tensor([0, 1])), (torch.eye(2), torch.tensor([0, 7]))
    assert knn_accuracy(*train, *test, k=1, temperature=0.1) == 0.5


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 3), (0,), (2, 3), (2,)),
        ((2, 3), (2,), (0, 3), (0,)),
        ((2, 3), (2,), (2, 4), (2,)),
        ((2, 3), (3,), (2, 3), (2,)),
        ((2, 3), (2,), (2, 3), (1,)),
        ((2, 3, 1), (2,), (2, 3), (2,)),
    ],
)
def test_says_which_shapes_it_got(shapes: tuple[tuple[int, ...], ...]) -> None:
    tensors = [torch.zeros(s, dtype=torch.long if len(s) == 1 else torch.float32) for s in shapes]
    with pytest.raises(ShapeError) as caught:
        knn_accuracy(*tensors, k=1, temperature=0.1)
    assert str(caught.value) == (
        f"expected (M, D), (M,), (N, D), (N,) with M, N > 0; got {list(shapes)}"
    )
