"""Multinomial logistic regression by L-BFGS, on the features' device.

The loss is scikit-learn's, LogisticRegression(solver="lbfgs"): the mean cross-entropy plus the
squared weights over 2 C M; the intercepts are not penalised. The stopping rule is
scikit-learn's, too.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = npt.NDArray[np.float64]

MAX_ITERATIONS = 200
_GRADIENT_TOLERANCE = 1e-4  # scikit-learn's
_LOSS_TOLERANCE = 64 * float(np.finfo(np.float64).eps)  # scikit-learn's
_LINE_SEARCH_STEPS = 50
_LOGITS_AT_ONCE = 1 << 25


class LogisticRegression(NamedTuple):
    """A linear classifier."""

    classes: Tensor
    """``(C,)`` int64: the class numbers that occur in training, in order."""
    weights: Tensor
    """``(D, C)`` float32."""
    biases: Tensor
    """``(C,)`` float32."""

    def predict(self, features: Tensor) -> Tensor:
        """Return the class numbers ``(N,)`` int64 predicted for features ``(N, D)``."""
        return self.classes[(features @ self.weights + self.biases).argmax(dim=1)]


@torch.no_grad()
def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    inverse_penalty: float,
    max_iterations: int = MAX_ITERATIONS,
    start: LogisticRegression | None = None,
) -> LogisticRegression:
    """Fit a linear classifier.

    Args:
        features: ``(M, D)`` float32, scaled to suit the penalty.
        labels: ``(M,)`` int64 class numbers on the same device; classes that do not occur are never
            predicted.
        inverse_penalty: C of scikit-learn, > 0.
        max_iterations: Maximal number of L-BFGS steps.
        start: Initial classifier, for the same classes; None starts at zero.

    Returns:
        The classifier, on the device of the features.
    """
    classes, numbers = torch.unique(labels, return_inverse=True)
    width, count = features.shape[1], len(classes)
    # For two classes scikit-learn penalises one weight vector w. The two here are w / 2 and -w / 2:
    # the sum of their squares is half as large.
    penalty = (2 if count == 2 else 1) / (inverse_penalty * len(features))

    # SciPy's optimizers take 0.3 s to load, and most processes of a run fit no classifier.
    from scipy.optimize import minimize  # noqa: PLC0415

    def loss_and_gradient(flat: Parameters) -> tuple[float, Parameters]:
        parameters = torch.from_numpy(flat.reshape(width + 1, count))
        loss, gradient = _cross_entropy(features, numbers, parameters)
        weights = parameters[:-1]
        gradient[:-1] += penalty * weights
        loss += 0.5 * penalty * float((weights * weights).sum())
        return loss, gradient.numpy().ravel()

    initial = np.zeros((width + 1, count))
    if start is not None:
        initial = torch.cat([start.weights, start.biases[None]]).double().cpu().numpy()
    result = minimize(
        loss_and_gradient,
        initial.ravel(),
        method="L-BFGS-B",
        jac=True,
        options={
            "maxiter": max_iterations,
            "maxls": _LINE_SEARCH_STEPS,
            "gtol": _GRADIENT_TOLERANCE,
            "ftol": _LOSS_TOLERANCE,
        },
    )
    parameters = torch.from_numpy(result.x.reshape(width + 1, count)).float().to(features.device)
    return LogisticRegression(classes, parameters[:-1], parameters[-1])


def _cross_entropy(features: Tensor, numbers: Tensor, parameters: Tensor) -> tuple[float, Tensor]:
    """Return the mean cross-entropy and its gradient, ``(D + 1, C)`` float64 on the CPU.

    Products with the features are float32, everything else float64: near the minimum, the loss
    decreases by less than float32 can resolve.
    """
    device, count = features.device, parameters.shape[1]
    weights = parameters[:-1].float().to(device)
    biases = parameters[-1].to(device)
    gradient = torch.zeros(parameters.shape, dtype=torch.float64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    at_once = max(1, _LOGITS_AT_ONCE // count)
    for some, truth in zip(features.split(at_once), numbers.split(at_once), strict=True):
        log_probabilities = F.log_softmax((some @ weights).double() + biases, dim=1)
        loss -= log_probabilities.gather(1, truth[:, None]).sum()
        residual = log_probabilities.exp_()
        residual[torch.arange(len(some), device=device), truth] -= 1
        gradient[:-1] += (some.T @ residual.float()).double()
        gradient[-1] += residual.sum(dim=0)
    return float(loss) / len(features), (gradient / len(features)).cpu()
