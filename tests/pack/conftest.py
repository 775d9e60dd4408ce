"""Photographs, some of them broken, and a way to call a verb."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from raysl.cli import main


class Called(NamedTuple):
    """What a command returned and printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Run a command in this process."""

    def run(*words: str | Path) -> Called:
        status = main(list(map(str, words)))
        printed = capsys.readouterr()
        return Called(status, printed.out, printed.err)

    return run


@pytest.fixture
def broken_photos(tmp_path: Path) -> Path:
    """Write thirty photographs of 160 x 120 pixels in two classes, two of them broken."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for number in range(30):
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (160, 120))
        path = root / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    (root / "cat" / "00.jpg").write_bytes(b"")
    (root / "dog" / "01.jpg").write_bytes(b"<html>")
    return root
