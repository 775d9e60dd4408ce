"""Measure features without labels in an evaluation, including pairs of views."""

import numpy as np
import numpy.typing as npt
import torch

from raysl.downstream.evaluation_config import EncoderOrigin
from raysl.encoder.file import load_encoder
from raysl.evaluate.embedding import normalisation
from raysl.evaluate.features import EvalImages
from raysl.evaluate.label_free import label_free_measures, positive_pairs
from raysl.train.batches import input_converter


def measure_label_free(
    origin: EncoderOrigin, features: npt.NDArray[np.float32], images: EvalImages
) -> dict[str, float]:
    """Return all measures of features that need no labels, including alignment.

    Alignment needs two views of at most 1,024 images; this process makes and embeds them.

    Args:
        origin: The encoder.
        features: Features of the images, ``(N, D)``.
        images: The test images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = normalisation(origin.encoder)
    pairs = positive_pairs(
        load_encoder(origin.encoder).to(device),
        images,
        to_input=input_converter(device=device, mean=mean, std=std, channels_last=False),
    )
    return label_free_measures(torch.from_numpy(features), pairs)
