"""The networks of the ready recipes start and norm as those of the methods' authors do."""

from pathlib import Path

import pytest

from raysl.nn.backbones import BackboneConfig
from raysl.run.recipe import load_run

FOLDER = Path(__file__).parents[2] / "configs"

# Residual branches start at zero; batch norm over all workers.
AUTHORS = {
    "simclr": (True, "sync"),  # google-research/simclr, tf2/resnet.py:366 and 467; run.py:216
    "simsiam": (True, "sync"),  # facebookresearch/simsiam, builder.py:24; main_simsiam.py:161
    "barlow": (True, "sync"),  # facebookresearch/barlowtwins, main.py:191 and 89
    "vicreg": (True, "sync"),  # facebookresearch/vicreg, main_vicreg.py:190 and 107
    "moco_v3": (True, "sync"),  # facebookresearch/moco-v3, main_moco.py:186 and 196
    "swav": (False, "sync"),  # facebookresearch/swav, resnet50.py:139; main_swav.py:158
    "dino": (False, "sync"),  # facebookresearch/dino, main_dino.py:176 and 197
}
# Recipes with settings of somebody else, who starts from torchvision's network.
OTHERS = {
    "simclr_resnet18_cifar10_lightly",  # lightly, examples/pytorch/simclr.py
    "simclr_resnet18_cifar10_short",  # beside it
    "simclr_resnet18_photos",  # our own
    "quickstart",  # our own
}
RECIPES = {path.stem: load_run(path) for path in sorted(FOLDER.glob("*.yaml"))}


def is_residual(backbone: BackboneConfig) -> bool:
    return backbone.family == "resnet"


@pytest.mark.parametrize("method", AUTHORS)
def test_every_recipe_has_the_residual_network_of_its_authors(method: str) -> None:
    found = {
        name: (run.backbone.zero_init_residual, run.backbone.batch_norm)
        for name, run in RECIPES.items()
        if run.method.name == method and is_residual(run.backbone) and name not in OTHERS
    }
    assert found
    assert set(found.values()) == {AUTHORS[method]}, found


def test_of_byol_only_bottlenecks_start_at_zero() -> None:
    """dm-haiku, nets/resnet.py: batchnorm_1 of a basic block starts at one (92), batchnorm_2 of a
    bottleneck at zero (104). The paper's results are of networks that start at one, without a
    difference for ResNet-50 (byol/README.md). They norm over all devices (byol/configs/byol.py)."""
    recipes = [run.backbone for run in RECIPES.values() if run.method.name == "byol"]
    assert recipes
    for backbone in recipes:
        assert backbone.zero_init_residual == (backbone.name not in ("resnet18", "resnet34"))
        assert backbone.batch_norm == "sync"


def test_moco_has_small_groups_of_images_and_starts_at_one() -> None:
    """By GPU in main_moco.py, in parts of the batch in moco_cifar10_demo.ipynb."""
    recipes = [run.backbone for run in RECIPES.values() if run.method.name == "moco"]
    assert {backbone.batch_norm for backbone in recipes} == {"worker", "split"}
    assert not any(backbone.zero_init_residual for backbone in recipes)


def test_transformers_are_drawn_as_their_authors_do() -> None:
    found = {
        (run.method.name, run.backbone.init) for run in RECIPES.values() if run.backbone.is_vit
    }
    assert found == {(name, name) for name in ("dino", "mae", "moco_v3")}


def test_moco_v3_decays_biases_and_norms_of_a_transformer() -> None:
    """moco-v3, main_moco.py:229: AdamW over all parameters."""
    recipes = [run for run in RECIPES.values() if run.method.name == "moco_v3"]
    decays = {run.backbone.is_vit: run.optim.decay_bias_and_norm for run in recipes}
    assert decays == {True: True, False: False}  # optimizer.py:27: LARS decays matrices alone
