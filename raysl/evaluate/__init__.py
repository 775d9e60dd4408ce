"""Measure the quality of frozen features, independent of how they were trained."""
