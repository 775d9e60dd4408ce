"""Open built-in data sets: scikit-learn's digits, torchvision's CIFAR-10, CIFAR-100 and STL-10.

Only the driver and the evaluation open them; data workers receive the pixels.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from raysl.errors import DataError
from raysl.sources.source import ArraySource, SourceConfig

SPLITS = ("train", "test")
_DIGIT_LEVELS = 16  # a digit's level counts the inked pixels of a 4 x 4 cell
_DIGITS_TEST_IMAGES = 450


def open_digits(split: str) -> ArraySource:
    """Open the 1,797 handwritten digits of 8 x 8 pixels in scikit-learn.

    The 450 test images are a fixed random sample, stratified by class.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI.
    """
    digits = load_digits()
    images = np.rint(digits.images * (255 / _DIGIT_LEVELS)).astype(np.uint8)
    rows = train_test_split(
        np.arange(len(images)),
        test_size=_DIGITS_TEST_IMAGES,
        random_state=0,
        stratify=digits.target,
    )[split == "test"]
    rows = np.sort(rows)
    names = [str(number) for number in range(10)]
    return ArraySource(
        f"digits/{split}", images[rows], digits.target[rows].astype(np.int64), names, SPLITS
    )


def open_torchvision(config: SourceConfig, split: str, *, root: str) -> ArraySource:
    """Open one of torchvision's data sets; download it if it is not below ``root``.

    The training split of STL-10 has 105,000 images; those without a label have label -1.

    Raises:
        DataError: If it is missing and cannot be downloaded.
    """
    name, folder = config.source, Path(root).expanduser()
    train = split == "train"
    # Imported lazily: the digits do not need it.
    datasets = importlib.import_module("torchvision.datasets")
    dataset: Any
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name == "stl10":
            dataset = datasets.STL10(
                str(folder), split="train+unlabeled" if train else "test", download=True
            )
            labels = dataset.labels
            images = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            dataset = kind(str(folder), train=train, download=True)
            images, labels = dataset.data, dataset.targets
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{config.named}: not found in {folder}, and the download failed ({error}). Put "
            f"torchvision's files there, set data.torchvision_root, or use a folder or Parquet"
        ) from None
    numbers = np.asarray(labels, np.int64)
    return ArraySource(f"{name}/{split}", images, numbers, dataset.classes, SPLITS)
