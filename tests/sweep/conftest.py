"""What several tests of sweeps start from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import validate
from raysl.config.yaml_text import to_yaml
from raysl.sweep.config import SweepConfig

MOCO = {
    "data": {"source": "digits", "views": {"recipe": "moco_v2", "size_px": 32}},
    "backbone": {"name": "resnet18", "stem": "small"},
    "method": {"name": "moco", "temperature": 0.2, "queue_length": 256},
    "train": {"epochs": 4, "global_batch_size": 64},
    "seed": 5,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small run of MoCo on the digits, as a file."""
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(MOCO))
    return path


@pytest.fixture
def sweep_of(base: Path) -> Callable[..., SweepConfig]:
    """Make a sweep of given sections over the small run."""

    def make(**sections: Any) -> SweepConfig:
        return validate(SweepConfig, {"name": "s", "base": str(base), **sections}, where="sweep")

    return make
