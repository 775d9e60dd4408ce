"""Run a verb, and weights in the layout of MoCo."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.cli import main
from raysl.nn.backbones import BackboneConfig, build_backbone


@pytest.fixture
def results_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a verb in this process and return the JSON object that it ends with."""

    def run(*words: str | Path, status: int = 0) -> dict[str, Any]:
        assert main([*map(str, words), "--json"]) == status
        results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return results

    return run


@pytest.fixture
def moco_file(tmp_path: Path) -> Path:
    """Write a checkpoint of MoCo with a small network and its momentum copy."""
    config = BackboneConfig(name="resnet18", stem="cifar", width=0.125)
    state = {}
    for seed, prefix in enumerate(("module.encoder_q.", "module.encoder_k.")):
        torch.manual_seed(seed)
        for name, value in build_backbone(config, image_size_px=32).net.state_dict().items():
            state[prefix + name] = value
    path = tmp_path / "moco.pth.tar"
    torch.save({"state_dict": state}, path)
    return path
