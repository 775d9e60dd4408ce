"""Encoded bytes to uint8 RGB pixels."""

import cv2
import numpy as np

from raysl.augment.crop import Image
from raysl.errors import DecodeError

_SIGNATURE_BYTES = 4


def decode(encoded: bytes | memoryview | Image, *, where: str) -> Image:
    """Decode one image.

    Args:
        encoded: A JPEG, PNG, WebP, BMP or TIFF file's bytes, or pixels that need no decoding,
            ``(H, W)`` or ``(H, W, 3)`` uint8.
        where: Name of the image for the error message.

    Returns:
        ``(H, W, 3)`` uint8 RGB, turned as its EXIF orientation says. Grey, palette and 16-bit
        images are converted, an alpha channel is dropped.

    Raises:
        DecodeError: If the bytes are not an image.
    """
    if isinstance(encoded, np.ndarray):
        return encoded if encoded.ndim == 3 else cv2.cvtColor(encoded, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]
    data = np.frombuffer(encoded, dtype=np.uint8)
    image = None
    if data.size:
        try:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
        except cv2.error:
            image = None
    if image is None:
        begins = bytes(data[:_SIGNATURE_BYTES]).hex() or "nothing"
        raise DecodeError(
            f"{where} ({data.size:,} bytes): not an image that OpenCV reads (begins with "
            f"{begins}); remove or replace it"
        )
    return image  # type: ignore[return-value]
