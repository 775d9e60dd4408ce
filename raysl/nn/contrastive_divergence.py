"""Contrastive divergence: lower the energy of data, raise that of the model's samples.

Y. Du, I. Mordatch: "Implicit Generation and Modeling with Energy-Based Models", 2019,
arXiv:1903.08689v6 (IGEBM).
"""

from torch import Tensor

from raysl.errors import ShapeError
from raysl.nn.precision import at_least_float32


def contrastive_divergence_loss(
    data_energies: Tensor, sample_energies: Tensor, *, regularisation: float = 0.0
) -> Tensor:
    r"""Compute the loss that lowers the energy of data and raises that of samples.

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
        Scalar float32, or float64 for float64 energies.

    Raises:
        ShapeError: If either is not a vector.

    Source: arXiv:1903.08689v6, eq. (2) and Algorithm 1.
    """
    if data_energies.ndim != 1 or sample_energies.ndim != 1:
        raise ShapeError(
            f"energies must be (N,) and (M,); got {tuple(data_energies.shape)}, "
            f"{tuple(sample_energies.shape)}"
        )
    data, samples = at_least_float32(data_energies), at_least_float32(sample_energies)
    squares = data.square().mean() + samples.square().mean()
    return data.mean() - samples.mean() + regularisation * squares
