"""Embeddings on a disk or in an object store, and what they say of the images: who is near whom."""
