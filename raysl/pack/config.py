"""The settings of `raysl pack`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysl.config.base import Idle, PositiveFloat, PositiveInt, Probability
from raysl.sources.source import LocatedSource

# Settings that may change when resuming, since no byte of a shard depends on them.
_FREE = {"source", "max_bad_share", "num_workers", "torchvision_root"}


class PackConfig(LocatedSource):
    """The source to pack, and the settings of its shards."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *LocatedSource.idle,
        Idle(("quality",), {"re_encode": ("png",)}),
        Idle(("verify",), {"re_encode": ("jpeg", "png")}),  # every image is decoded then
    )
    short_side_px: PositiveInt | None = None
    """Shrink images whose shorter side is longer than this; smaller ones are not enlarged. null
    keeps all sizes."""
    re_encode: Literal["needed", "jpeg", "png"] = "needed"
    """needed keeps the original bytes of JPEG, PNG and WebP files that are not shrunk, and makes a
    JPEG of any other (a PNG of the pixels of built-in sets); jpeg and png make one of every
    image."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Quality of the JPEGs that are encoded."""
    verify: bool = True
    """Decode every image to find the broken ones; false decodes only those that are changed."""
    max_megapixels: Annotated[float, Field(gt=0.0, le=178.0)] = 100.0
    """Limit above which an image is bad: small files can decompress to gigabytes."""
    max_bad_share: Probability = 0.01
    """Stop once more than this share of the images turns out to be bad."""
    shard_mib: Annotated[float, Field(gt=0.0, le=1024.0)] = 256.0
    """Size of a shard; a worker holds about two of them."""
    row_group_mib: PositiveFloat = 8.0
    """Size of a row group, the unit that training reads."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the shuffle."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Number of concurrent Ray tasks; null takes one for each CPU of the cluster, 0 works in this
    process, in threads and without Ray."""

    def lasting(self) -> dict[str, Any]:
        """Return the settings that the shards depend on, which must not change when resuming."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in _FREE}
