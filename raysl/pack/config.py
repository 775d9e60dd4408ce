"""The settings of `raysl pack`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysl.config.base import Idle, PositiveFloat, PositiveInt, Probability
from raysl.sources.source import LocatedSource

# Settings that may change when resuming, since nothing in a shard depends on them.
_CHANGEABLE = {"source", "max_bad_share", "num_workers", "torchvision_root"}


class ResumableSource(LocatedSource):
    """The source of a command that may be interrupted, and then must find it unchanged."""

    def lasting(self) -> dict[str, Any]:
        """Return the settings that the shards depend on, which must not change when resuming."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in _CHANGEABLE}


class PackConfig(ResumableSource):
    """The source to pack, and the settings of its shards."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *LocatedSource.idle,
        Idle(("quality",), {"re_encode": ("png",)}),
        Idle(("verify",), {"re_encode": ("jpeg", "png")}),  # every image is decoded then
    )
    short_side_px: PositiveInt | None = None
    """Shrink images to this shorter side; smaller images are not enlarged. null keeps all sizes."""
    re_encode: Literal["needed", "jpeg", "png"] = "needed"
    """needed keeps the original bytes of JPEG, PNG and WebP files that are not shrunk, and encodes
    other images as JPEG (pixels of built-in sets as PNG); jpeg and png encode every image so."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Quality of images that are encoded as JPEG."""
    verify: bool = True
    """Decode every image to find bad ones; false decodes only images that are re-encoded."""
    max_megapixels: Annotated[float, Field(gt=0.0, le=178.0)] = 100.0
    """An image of more pixels is bad: small files can decompress to gigabytes."""
    max_bad_share: Probability = 0.01
    """Largest allowed share of bad images; more stop the work."""
    shard_mib: Annotated[float, Field(gt=0.0, le=1024.0)] = 256.0
    """Size of a shard; a worker holds about two shards in memory."""
    row_group_mib: PositiveFloat = 8.0
    """Size of a row group, the unit that training reads."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the shuffle."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Number of concurrent Ray tasks; null runs one per CPU of the cluster, 0 works in threads of
    this process, without Ray."""
