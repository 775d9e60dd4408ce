"""Image operations on uint8 arrays, each split in two: plan (random, no pixels) and apply.

NumPy, OpenCV and Pillow only: the data workers import this room, and nothing here imports torch.
"""
