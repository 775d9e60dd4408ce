"""Batches of one image: what the configuration refuses is what cannot be trained, and no more."""

from typing import Any

import pytest
import torch

from raysl.errors import ConfigError
from raysl.methods import load_method, pretraining_method_names
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.run.recipe import run_from_values

# Small enough to be quick; heads as they are by default.
SMALL: dict[str, dict[str, Any]] = {
    "barlow": {"hidden_dim": 16, "projection_dim": 16},
    "vicreg": {"hidden_dim": 16, "projection_dim": 16},
    "byol": {"hidden_dim": 16, "projection_dim": 16},
    "simsiam": {"hidden_dim": 16, "projection_dim": 16, "predictor_hidden_dim": 8},
    "moco_v3": {"hidden_dim": 16, "projection_dim": 16},
    "swav": {"hidden_dim": 16, "num_prototypes": 8},
    "dino": {"hidden_dim": 16, "num_prototypes": 8},
    "context_encoder": {"bottleneck_dim": 16, "decoder_width": 4, "discriminator_width": 4},
    "ebm": {"langevin_steps": 1, "buffer_length": 8},
    "mae": {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1},
    "jigsaw": {"grid": 2, "tile_dim": 8},
    "margin": {"num_others": 1},
}
# One image says nothing to these, although nothing breaks: nothing to compare it with, or batch
# norm over two views of it, which are then each other's opposite.
MEANINGLESS = {"simclr", "sigmoid", "swav", "margin"}


def _config(name: str, images: int) -> Any:
    method = load_method(name).Config.model_validate({"name": name} | SMALL.get(name, {}))
    kinds = [{"count": method.num_views, "size_px": 32}]
    return run_from_values(
        {
            "name": "a",
            "data": {"source": "digits", "views": {"recipe": "custom", "kinds": kinds}},
            "backbone": {"name": "vit_tiny", "patch_size_px": 4, "depth": 1},
            "method": method.model_dump(mode="json"),
            "train": {"steps": 1, "global_batch_size": images},
        },
        where="test",
    )


@pytest.mark.parametrize("name", pretraining_method_names())
def test_a_head_that_cannot_take_one_image_is_refused_and_two_are_fine(name: str) -> None:
    config = _config(name, 2)
    data = TrainingSet(64, 2, config.view_sizes_px)
    backbone = build_backbone(BackboneConfig(**config.backbone.model_dump()), image_size_px=32)
    method = load_method(name)(config.method, backbone, data).train()

    def step(images: int) -> None:
        views = [torch.randn(images, 3, 32, 32) for _ in range(config.method.num_views)]
        output = method.loss(Batch(views, torch.arange(images)), Progress(0, 2, 1, 0))
        output.loss.backward()  # type: ignore[no-untyped-call]
        assert output.loss.isfinite()

    step(2)
    try:
        step(1)
        works = name not in MEANINGLESS
    except ValueError:  # of torch's batch norm, or of a loss that counts its images
        works = False
    if works:
        _config(name, 1)
    else:
        with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
            _config(name, 1)


@pytest.mark.parametrize("name", ["nce", "dino"])
def test_batch_norm_in_a_head_that_has_it_by_choice_counts(name: str) -> None:
    kind = load_method(name).Config
    assert not kind.model_validate({"name": name}).norms_images
    assert kind.model_validate({"name": name, "head_batch_norm": True}).norms_images


@pytest.mark.parametrize("name", ["barlow", "vicreg"])
def test_a_head_of_one_layer_has_no_batch_norm(name: str) -> None:
    kind = load_method(name).Config
    assert kind.model_validate({"name": name}).norms_images
    assert not kind.model_validate({"name": name, "projection_layers": 1}).norms_images
