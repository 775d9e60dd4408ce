"""Turn encoded images into blocks of uint8 views; no Ray and no torch."""
