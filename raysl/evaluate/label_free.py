"""How good features may be, told without labels: what runs can be compared by.

None of these numbers is an accuracy. How well each ranks encoders is measured by
``raysl benchmark label_free``.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysl.augment.ops import Flip
from raysl.augment.pipeline import Crop, View, make_views
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
"""Of the measures and of the pairs: numbers of one version can be compared."""

PAIR_CROP_SCALE = (0.2, 1.0)

_MOST_SPREAD_ROWS = 2048
_BATCH = 256
_SEED = 0


@torch.no_grad()
def label_free(
    features: Tensor, positives: tuple[Tensor, Tensor] | None = None
) -> dict[str, float]:
    """Measure features without labels.

    What is measured are the encoder's features, before the projection head, of images without
    augmentation: every method and every file has them.

    Args:
        features: ``(M, D)`` float, not normalised. RankMe stands still from some 25,000 images on
            and cannot exceed M: compare encoders on the same images.
        positives: Two ``(P, D)``, features of two views of the same images, as
            :func:`positive_pairs` makes them; None leaves ``alignment`` out.

    Returns:
        ``rankme``, in [1, min(M, D)], higher is better: the exponential of the entropy of the
        normalised singular values. ``alpha_req``, better near 1: how fast the eigenvalues of the
        covariance fall. ``alignment``, in [0, 4], lower is better: squared distance between the
        directions of two views. ``uniformity``, in [-8, 0], lower is better: over at most 2,048
        images, spread evenly. ``feature_std``, in [0, 1]: 0 is collapse. What cannot be computed is
        left out; nothing can if a feature is not finite.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: RankMe: Garrido et al. 2022, arXiv:2210.02885v3, eq. (1). alpha-ReQ: Agrawal et al.
        2022, NeurIPS 35. Alignment and uniformity: Wang and Isola 2020, arXiv:2005.10242v10.
        ``feature_std``: Chen and He 2020, arXiv:2011.10566v1, sec. 4.1.
    Departs: RankMe's authors take the projector's outputs on 25,600 images and add 1e-7 to each
        share, which their float32 needs; here float64 does without. Wang and Isola measure
        uniformity on augmented images.
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
    some = features[torch.from_numpy(spread.astype(np.int64)).to(features.device)]
    measured = {
        "rankme": float(effective_rank(features)),
        "alpha_req": math.nan if law is None else law.exponent,
        "alignment": math.nan if positives is None else float(alignment(*positives)),
        "uniformity": float(uniformity(some, most_rows=_MOST_SPREAD_ROWS)),
        "feature_std": float(feature_std(features)),
    }
    return {name: value for name, value in measured.items() if math.isfinite(value)}


def pair_views(size_px: int) -> tuple[View, ...]:
    """Return the views of :func:`positive_pairs`: crops of 20 to 100 % of the area, and flips.

    The same for every encoder, whatever it was trained with. Crops and flips are what the recipes
    of nearly all methods share; distorting colours too would favour those that trained on it.
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
    """Return the features of two views of some images, in this process alone.

    Args:
        encoder: Maps ``(B, 3, S, S)`` to ``(B, D)``; runs in evaluation mode and is left in the
            mode it was in.
        images: Where they are. A view is a function of the image's row alone, so that all encoders
            see the same.
        to_input: Turns ``(B, S, S, 3)`` uint8 into the encoder's input on its device.
        num_images: At most so many, spread evenly.

    Returns:
        Two ``(P, D)`` float32 on the CPU; row i of both is of one image.
    """
    spread = np.linspace(0, len(images) - 1, min(len(images), num_images))
    places = np.unique(spread.astype(np.int64))
    views = pair_views(images.size_px)

    def two(place: int) -> npt.NDArray[np.uint8]:
        row = int(images.rows[place])
        (made,) = make_views(images.image(place), views, seed=_SEED, epoch=0, index=row)
        return np.stack(made)

    was_training = encoder.training
    encoder.eval()
    firsts: list[Tensor] = []
    seconds: list[Tensor] = []
    try:
        with ThreadPoolExecutor(images.num_threads, thread_name_prefix="raysl-pairs") as pool:
            for start in range(0, len(places), _BATCH):
                pairs = np.stack(list(pool.map(two, places[start : start + _BATCH].tolist())))
                for kept, number in ((firsts, 0), (seconds, 1)):
                    pixels = np.ascontiguousarray(pairs[:, number])
                    kept.append(encoder(to_input(pixels)).float().cpu())
    finally:
        encoder.train(was_training)
    return torch.cat(firsts), torch.cat(seconds)
