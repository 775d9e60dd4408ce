"""From encoded images to blocks of uint8 views: order, decoding, making; no Ray and no torch."""
