"""Weighted k-nearest-neighbour classification of frozen features.

Z. Wu, Y. Xiong, S. Yu, D. Lin: "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", 2018, arXiv:1805.01978v1, sec. 3.4.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.errors import ShapeError

_ROWS_AT_ONCE = 1024
_MOST_SIMILARITIES = 1 << 27  # computed at once: 512 MiB


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float,
) -> float:
    """Return the accuracy of the weighted vote of each test image's nearest neighbours.

    Args:
        train_features: ``(M, D)`` float, not normalised.
        train_labels: ``(M,)`` int64, class numbers >= 0.
        test_features: ``(N, D)`` float.
        test_labels: ``(N,)`` int64.
        k: Number of neighbours, > 0; at most M are used.
        temperature: > 0; a neighbour of cosine similarity s votes with exp(s / temperature).

    Returns:
        Accuracy in [0, 1]; every test row counts.

    Raises:
        ShapeError: If the shapes do not fit or a set is empty.
    """
    check_shapes(train_features, train_labels, test_features, test_labels)
    predictions = knn_predictions(
        train_features, train_labels, test_features, ks=[k], temperature=temperature
    )[k]
    return int((predictions == test_labels).sum()) / len(test_labels)


@torch.no_grad()
def knn_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Tensor]:
    """Return the votes of each test image's neighbours, for several k in one pass.

    Each of the k nearest training images by cosine similarity s votes with exp(s / temperature).

    Args:
        train_features: ``(M, D)`` float, not normalised.
        train_labels: ``(M,)`` int64 class numbers; memory grows with the number of distinct ones.
        test_features: ``(N, D)`` float, on the same device.
        ks: Numbers of neighbours, each > 0; at most M are used.
        temperature: > 0.

    Returns:
        For each k the class numbers ``(N,)`` int64.
    """
    bank = F.normalize(train_features.float(), dim=1)
    classes, numbers = torch.unique(train_labels, return_inverse=True)
    votes_of: dict[int, list[Tensor]] = {k: [] for k in ks}
    at_once = max(1, min(_ROWS_AT_ONCE, _MOST_SIMILARITIES // len(bank)))
    for rows in test_features.split(at_once):
        similarity = F.normalize(rows.float(), dim=1) @ bank.T  # (rows, M)
        nearest, indices = similarity.topk(min(max(ks), len(bank)), dim=1)  # nearest first
        # Subtracting the largest similarity leaves the vote unchanged and prevents overflow.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        voted = numbers[indices]
        for k, parts in votes_of.items():
            votes = weights.new_zeros(len(rows), len(classes))
            votes.scatter_add_(1, voted[:, :k], weights[:, :k])
            parts.append(classes[votes.argmax(dim=1)])
    return {k: torch.cat(parts) for k, parts in votes_of.items()}


def check_shapes(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> None:
    """Raise ShapeError unless features and labels fit each other and neither set is empty."""
    shapes = [tuple(x.shape) for x in (train_features, train_labels, test_features, test_labels)]
    fits = (
        train_features.ndim == test_features.ndim == 2
        and train_features.shape[1] == test_features.shape[1]
        and len(train_features) == len(train_labels) > 0
        and len(test_features) == len(test_labels) > 0
    )
    if not fits:
        raise ShapeError(f"expected (M, D), (M,), (N, D), (N,) with M, N > 0; got {shapes}")
