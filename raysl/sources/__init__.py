"""Find and read encoded images in folders, Parquet, tar and built-in sets; no Ray, no torch."""
