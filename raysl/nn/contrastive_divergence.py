"""Contrastive divergence: lower the energy of data, raise that of the model's samples.

Y. Du, I. Mordatch: "Implicit Generation and Modeling with Energy-Based Models", 2019,
arXiv:1903.08689v6 (IGEBM).
"""

import torch
from torch import Tensor

from raysl.errors import ShapeError


def contrastive_divergence_loss(
    data_energies: Tensor, sample_energies: Tensor, *, regularisation: float = 0.0
) -> Tensor:
    r"""Lower the energy of data and raise that of the model's samples.

    .. math::
        L = \frac1N \sum_n \big( E(x_n^+) - E(x_n^-) \big)
            + \alpha \frac1N \sum_n \big( E(x_n^+)^2 + E(x_n^-)^2 \big)

    Without the second term, and with exact samples, its gradient is that of the negative
    log-likelihood; its value is meaningless.

    Args:
        data_energies: ``(N,)``.
        sample_energies: ``(M,)``, of samples without gradient.
        regularisation: Alpha, >= 0.

    Returns:
        Scalar float32, or float64 if given that.

    Raises:
        ShapeError: If either is not a vector.

    Source: arXiv:1903.08689v6, eq. (2) and Algorithm 1.
    """
    if data_energies.ndim != 1 or sample_energies.ndim != 1:
        raise ShapeError(
            f"energies must be (N,) and (M,); got {tuple(data_energies.shape)}, "
            f"{tuple(sample_energies.shape)}"
        )
    data, samples = _exact(data_energies), _exact(sample_energies)
    size = data.square().mean() + samples.square().mean()
    return data.mean() - samples.mean() + regularisation * size


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
