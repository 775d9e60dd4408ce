"""Ownership, locking and atomic writes of folders. Loads neither torch nor Ray.

A file or folder under its final name is complete, however a process ends. One process at a time
writes to a folder. A command with other settings than those of a folder does not write to it.
"""
