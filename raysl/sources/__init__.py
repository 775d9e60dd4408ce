"""Where encoded images come from, and how to read some of them: no Ray and no torch."""
