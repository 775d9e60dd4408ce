"""Ownership, locking and atomic writes of folders. Loads neither torch nor Ray.

A file or folder under its final name is complete, however a process ends. One process at a time
writes to a folder. A folder that was created with other settings is refused, never mixed.
"""
