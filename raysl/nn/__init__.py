"""Torch modules and functions that more than one method or stage uses."""
