"""Sweeps: many runs over a space of settings, what each is, and where it lies."""
