"""What a folder is: whose it is, who holds it, and how what lies in it appears; no torch, no Ray.

A file or folder with a lasting name is complete, whenever and however a process ends; a folder is
written by one process at a time; and one that belongs to something else is refused, not mixed.
"""
