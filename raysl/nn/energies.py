"""What is said of energies while a model of them is trained, and how they meet images."""

from torch import Tensor


def contrast(of_data: Tensor, of_others: Tensor, others: str) -> dict[str, Tensor]:
    """Return the mean energies ``(N,)`` of data and of others, and how far they lie apart."""
    data, rest = of_data.mean(), of_others.mean()
    return {"ebm/energy_data": data, f"ebm/energy_{others}": rest, "ebm/energy_gap": rest - data}


def by_row(values: Tensor) -> Tensor:
    """Return a value an image, ``(N,)``, in the shape ``(N, 1, 1, 1)`` that images broadcast to."""
    return values.view(-1, 1, 1, 1)


def mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Return the mean of the values ``(N,)`` that are chosen, bool; 0 where none is."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def range_of(energies: Tensor) -> str:
    """Say in words from where to where energies go."""
    return f"{float(energies.min()):.2f} to {float(energies.max()):.2f}"
