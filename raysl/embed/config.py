"""The settings of `raysl embed`."""

from typing import Annotated, Literal

from pydantic import Field

from raysl.config.base import PositiveInt, Probability
from raysl.pack.config import ResumableSource


class EmbedConfig(ResumableSource):
    """The source to embed, and the settings of its embedding."""

    size_px: PositiveInt | None = None
    """Side of the encoder's input image in pixels; null takes the side that it was trained with."""
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Side of the centred square over the image's short side (0.875 is usual for ImageNet)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder's layers."""
    store: Literal["float32", "float16"] = "float32"
    """Type of the stored features; float16 halves their size."""
    normalize: bool = False
    """Scale each feature vector to unit length."""
    max_bad_share: Probability = 0.01
    """Largest allowed share of bad images; they are left out and listed, and more stop the work."""
    shard_mib: Annotated[float, Field(gt=0.0, le=1024.0)] = 32.0
    """Size of the features of a shard; an interruption loses the work on unfinished shards."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Number of Ray actors on CPUs; null starts one per free CPU of the cluster (and one per GPU),
    0 works in this process without Ray."""
