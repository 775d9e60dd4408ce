from pathlib import Path
from typing import Any

import torch

from raysl.encoder.file import save_encoder
from raysl.evaluate.embedding import encoder_digest
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone


def network(seed: int) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone(BackboneConfig(name="resnet18", width=0.25), image_size_px=16)


def test_an_encoder_is_known_by_its_weights_and_not_by_its_file(tmp_path: Path) -> None:
    config = BackboneConfig(name="resnet18", width=0.25).model_dump(mode="json")
    known: dict[str, Any] = {"backbone": config, "image_size_px": 16}
    known |= {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    files = {
        "first": (network(0), known),
        "renamed": (network(0), known | {"run": "another"}),
        "other weights": (network(1), known),
        "other mean": (network(0), known | {"mean": [0.4, 0.5, 0.5]}),
    }
    found = {}
    for name, (encoder, description) in files.items():
        save_encoder(tmp_path / "encoder.safetensors", encoder, description=description)
        found[name] = encoder_digest(tmp_path / "encoder.safetensors")
    assert found["first"] == found["renamed"]
    assert len(set(found.values())) == 3
