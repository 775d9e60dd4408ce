"""Image operations on uint8 arrays, each split in two: plan (random, no pixels) and apply.

NumPy, OpenCV and Pillow only, no torch: data workers import this package.
"""
