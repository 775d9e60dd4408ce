"""Measure features without labels: RankMe, alpha-ReQ, alignment, uniformity and spread.

None of these is an accuracy; docs/results.md reports how well each ranks encoders.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysl.augment.crop import Crop
from raysl.augment.ops import Flip
from raysl.augment.pipeline import View, make_views
from raysl.errors import ShapeError
from raysl.evaluate.features import EvalImages
from raysl.nn.geometry import (
    alignment,
    covariance_spectrum,
    effective_rank,
    feature_std,
    fit_power_law,
    uniformity,
)

VERSION = 1
"""Version of the measures and the view pairs: only numbers of the same version are comparable."""

PAIR_CROP_SCALE = (0.2, 1.0)

_MOST_SPREAD_ROWS = 2048
_BATCH = 256
_SEED = 0


@torch.no_grad()
def label_free_measures(
    features: Tensor, positives: tuple[Tensor, Tensor] | None = None
) -> dict[str, float]:
    """Measure features without labels.

    These are the encoder's features, before the projection head, of images without augmentation:
    every method and every weight file has them.

    Args:
        features: ``(M, D)`` float, not normalised. RankMe cannot exceed M and levels off from some
            25,000 images on: compare encoders on the same images.
        positives: Two tensors ``(P, D)``, the features of two views of the same images, from
            :func:`positive_pairs`; None omits ``alignment``.

    Returns:
        ``rankme``, in [1, min(M, D)], higher is better: the exponential of the entropy of the
        normalised singular values. ``alpha_req``, better near 1: the decay exponent of the
        covariance's eigenvalues. ``alignment``, in [0, 4], lower is better: squared distance
        between the directions of two views. ``uniformity``, in [-8, 0], lower is better: on at
        most 2,048 evenly spaced images. ``feature_std``, in [0, 1]: 0 is collapse. Values that
        cannot be computed are omitted; the result is empty if a feature is not finite.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: RankMe: Garrido et al. 2022, arXiv:2210.02885v3, eq. (1). alpha-ReQ: Agrawal et al.
    2022, NeurIPS 35. Alignment and uniformity: Wang and Isola 2020, arXiv:2005.10242v10.
    ``feature_std``: Chen and He 2020, arXiv:2011.10566v1, sec. 4.1.
    Departs: RankMe's authors use the projector's outputs on 25,600 images and add 1e-7 to each
    share, which float32 needs; float64, used here, does not. Wang and Isola measure uniformity on
    augmented images.
    """
    shapes = [tuple(x.shape) for x in (features, *(positives or ()))]
    fits = all(len(shape) == 2 and shape[0] > 0 for shape in shapes) and all(
        shape == (shapes[1][0], shapes[0][1]) for shape in shapes[1:]
    )
    if not fits:
        raise ShapeError(f"expected features (M, D) and pairs (P, D), (P, D); got {shapes}")
    if not features.isfinite().all():
        return {}
    law = fit_power_law(covariance_spectrum(features))
    spread = np.linspace(0, len(features) - 1, min(len(features), _MOST_SPREAD_ROWS))
    subset = features[torch.from_numpy(spread.astype(np.int64)).to(features.device)]
    measured = {
        "rankme": float(effective_rank(features)),
        "alpha_req": math.nan if law is None else law.exponent,
        "alignment": math.nan if positives is None else float(alignment(*positives)),
        "uniformity": float(uniformity(subset, most_rows=_MOST_SPREAD_ROWS)),
        "feature_std": float(feature_std(features)),
    }
    return {name: value for name, value in measured.items() if math.isfinite(value)}


def pair_views(size_px: int) -> tuple[View, ...]:
    """Return the views of :func:`positive_pairs`: crops of 20 to 100 % of the area, and flips.

    They are the same for every encoder, however it was trained. Nearly all recipes include crops
    and flips; colour distortions would favour encoders trained on them.
    """
    return (View(count=2, size_px=size_px, crop=Crop(scale=PAIR_CROP_SCALE), ops=(Flip(),)),)


@torch.no_grad()
def positive_pairs(
    encoder: nn.Module,
    images: EvalImages,
    *,
    to_input: Callable[[npt.NDArray[np.uint8]], Tensor],
    num_images: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return the features of two views of some images, computed by this process alone.

    Args:
        encoder: Maps ``(B, 3, S, S)`` to ``(B, D)``; runs in evaluation mode, and its mode is
            restored.
        images: The images. A view depends only on the image's row, so all encoders see the same
            views.
        to_input: Converts ``(B, S, S, 3)`` uint8 to the encoder's input on its device.
        num_images: Maximal number of images, evenly spaced.

    Returns:
        Two tensors ``(P, D)`` float32 on the CPU; row i of both belongs to the same image.
    """
    spread = np.linspace(0, len(images) - 1, min(len(images), num_images))
    indices = np.unique(spread.astype(np.int64))
    views = pair_views(images.size_px)

    def view_pair(index: int) -> npt.NDArray[np.uint8]:
        row = int(images.rows[index])
        (pair,) = make_views(images.image(index), views, seed=_SEED, epoch=0, index=row)
        return np.stack(pair)

    was_training = encoder.training
    encoder.eval()
    firsts: list[Tensor] = []
    seconds: list[Tensor] = []
    try:
        with ThreadPoolExecutor(images.num_threads, thread_name_prefix="raysl-pairs") as pool:
            for start in range(0, len(indices), _BATCH):
                pairs = np.stack(
                    list(pool.map(view_pair, indices[start : start + _BATCH].tolist()))
                )
                for parts, number in ((firsts, 0), (seconds, 1)):
                    pixels = np.ascontiguousarray(pairs[:, number])
                    parts.append(encoder(to_input(pixels)).float().cpu())
    finally:
        encoder.train(was_training)
    return torch.cat(firsts), torch.cat(seconds)
