"""From a source of images to blocks of uint8 views: plain functions, no Ray and no torch."""
