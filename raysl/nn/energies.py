"""Metrics and shape helpers for energies of images."""

from torch import Tensor


def contrast(of_data: Tensor, of_others: Tensor, others: str) -> dict[str, Tensor]:
    """Return the mean energies ``(N,)`` of data and of other images, and their difference."""
    data, rest = of_data.mean(), of_others.mean()
    return {"ebm/energy_data": data, f"ebm/energy_{others}": rest, "ebm/energy_gap": rest - data}


def by_row(values: Tensor) -> Tensor:
    """Reshape one value an image, ``(N,)``, to ``(N, 1, 1, 1)``, to broadcast with images."""
    return values.view(-1, 1, 1, 1)


def mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Return the mean of the values ``(N,)`` selected by a bool mask; 0 if none is."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def range_of(energies: Tensor) -> str:
    """Describe the range of energies in words."""
    return f"{float(energies.min()):.2f} to {float(energies.max()):.2f}"
