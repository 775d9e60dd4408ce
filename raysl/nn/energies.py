"""Metrics and shape helpers for energies of images."""

from torch import Tensor


def contrast(data_energies: Tensor, other_energies: Tensor, others: str) -> dict[str, Tensor]:
    """Return metrics of the energies ``(N,)`` of data and other images: means and difference."""
    data, rest = data_energies.mean(), other_energies.mean()
    return {"ebm/energy_data": data, f"ebm/energy_{others}": rest, "ebm/energy_gap": rest - data}


def per_image(values: Tensor) -> Tensor:
    """Reshape one value per image, ``(N,)``, to ``(N, 1, 1, 1)``, to broadcast with images."""
    return values.view(-1, 1, 1, 1)


def mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Return the mean of the values ``(N,)`` selected by a bool mask; 0 if none is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def range_text(energies: Tensor) -> str:
    """Return the range of energies as a text."""
    return f"{float(energies.min()):.2f} to {float(energies.max()):.2f}"
