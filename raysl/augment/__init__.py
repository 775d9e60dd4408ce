"""Image operations on uint8 arrays, in two steps: plan (random, no pixels) and apply.

NumPy, OpenCV and Pillow only, no torch: data workers import this package.
"""
