"""Folders in object stores: their objects, leases, and local copies. Loads neither torch nor Ray.

A process that reads or writes such a folder works on a local copy, its scratch, as on any folder. A
mirror copies between both. Only whole objects appear in a store, so the order of copying makes it
consistent at any moment.
"""
