"""Draw the eigenvalue spectrum of features, and a power law fitted to it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysl.errors import DataError
from raysl.nn.geometry import covariance_spectrum, effective_rank, fit_power_law
from raysl.report.figure import (
    BLUE,
    INK,
    LIGHT_GREY,
    NARROW_IN,
    ORANGE,
    new_figure,
    save_png,
    style_axes,
)

_ROUNDING = 1e-12  # of the largest eigenvalue; smaller ones are rounding errors


def draw_spectrum(path: Path, features: npt.NDArray[np.float32]) -> None:
    """Draw the eigenvalues of the features' covariance over their rank, both logarithmic.

    Args:
        path: PNG to write.
        features: ``(M, D)``; rows that are not finite are left out.

    Raises:
        DataError: If there is no variance.
    """
    finite = torch.from_numpy(features[np.isfinite(features).all(axis=1)])
    values = covariance_spectrum(finite) if len(finite) > 1 else torch.zeros(0)
    if not len(values) or values[0] <= 0:
        raise DataError("all features are the same: there is no spectrum to draw")
    law = fit_power_law(values)
    shares = (values / values.sum()).numpy()
    shares = shares[shares > _ROUNDING * shares[0]]
    ranks = np.arange(1, len(shares) + 1)
    figure = new_figure(width_in=NARROW_IN, height_in=3.5)
    axes = figure.subplots()
    rank = float(effective_rank(finite))
    title = f"RankMe {rank:.1f} of {finite.shape[1]} dimensions"
    if law is not None:
        title += f"; alpha {law.exponent:.2f}"
    style_axes(axes, title=title)
    axes.title.set_fontsize(10.5)
    axes.tick_params(labelsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if law is not None:
        axes.axvspan(law.first, law.last, color=LIGHT_GREY, alpha=0.35, linewidth=0)
        line = law.scale * ranks.astype(np.float64) ** -law.exponent / float(values.sum())
        text = f"power law, fitted to ranks {law.first} to {law.last}"
        axes.plot(ranks, line, color=ORANGE, linewidth=1.6, linestyle="--", label=text)
    style: dict[str, Any] = {"markersize": 2.6, "linewidth": 1.0, "color": BLUE}
    axes.plot(ranks, shares, "o-", label="eigenvalues of the covariance", **style)
    axes.set_ylim(float(shares[-1]) / 3, 2)
    axes.set_xlabel("rank of the eigenvalue", fontsize=9.5, color=INK)
    axes.set_ylabel("share of the variance", fontsize=9.5, color=INK)
    axes.legend(loc="lower left", frameon=False, fontsize=9.5)
    save_png(figure, path)
