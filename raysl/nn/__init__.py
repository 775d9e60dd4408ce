"""Torch parts that more than one method or stage needs."""
