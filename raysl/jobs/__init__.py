"""The work of one process from start to end, independent of who started it; no Ray."""
