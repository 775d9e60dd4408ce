"""Sweeps: many runs over a space of settings, their candidates, folders and results."""
