import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as OfScikitLearn
from torch import Tensor

from raysl.evaluate.logistic import fit_logistic


def clusters(n: int, *, classes: int, seed: int = 0, d: int = 6) -> tuple[Tensor, Tensor]:
    centers = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = centers[labels] + rng.normal(size=(n, d))
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0, 100.0])
def test_probabilities_are_those_of_scikit_learn(classes: int, inverse_penalty: float) -> None:
    """Also of two classes, for which scikit-learn has one vector of weights."""
    features, labels = clusters(120, classes=classes)
    found = fit_logistic(features, labels, inverse_penalty=inverse_penalty)
    theirs = OfScikitLearn(C=inverse_penalty, max_iter=2000, tol=1e-7)
    theirs.fit(features.double().numpy(), labels.numpy())
    ours = torch.softmax((features @ found.weights + found.biases).double(), dim=1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(features.double().numpy()), atol=1e-2)


def test_a_class_that_does_not_occur_is_never_predicted_and_numbers_stay() -> None:
    features, labels = clusters(90, classes=3)
    numbers = torch.tensor([1, 4, 9])
    found = fit_logistic(features, numbers[labels], inverse_penalty=1.0)
    assert found.classes.tolist() == [1, 4, 9]
    plain = fit_logistic(features, labels, inverse_penalty=1.0)
    assert torch.equal(found.predict(features), numbers[plain.predict(features)])


def test_a_start_changes_the_way_and_not_the_end() -> None:
    features, labels = clusters(150, classes=4)
    start = fit_logistic(features, labels, inverse_penalty=0.01)
    cold = fit_logistic(features, labels, inverse_penalty=1.0)
    warm = fit_logistic(features, labels, inverse_penalty=1.0, start=start)
    torch.testing.assert_close(warm.weights, cold.weights, atol=5e-3, rtol=0)
    assert not torch.allclose(start.weights, cold.weights, atol=0.1)


def test_rows_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(101, classes=3)
    whole = fit_logistic(features, labels, inverse_penalty=1.0)
    monkeypatch.setattr("raysl.evaluate.logistic._LOGITS_AT_ONCE", 21)  # 7 rows, and 3 are left
    parts = fit_logistic(features, labels, inverse_penalty=1.0)
    torch.testing.assert_close(parts.weights, whole.weights, atol=1e-3, rtol=0)
