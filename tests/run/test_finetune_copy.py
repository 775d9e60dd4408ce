"""The run that ``evaluate.finetune`` makes of a pretraining."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.evaluate.finetune import FinetuneConfig
from raysl.evaluate.training_source import open_training_source
from raysl.run.finetune_copy import finetune_run
from raysl.run.recipe import load_run
from raysl.track.run_folder import RunFolder

VIT = "backbone={name: vit_tiny, patch_size_px: 8, depth: 2}"
MAE = [
    VIT,
    "data.views={recipe: mae, size_px: 32}",
    "method={name: mae, decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}",
]
DINO = [
    VIT,
    "data.views={recipe: dino, size_px: 32, local_count: 0}",
    "method={name: dino, num_prototypes: 16}",
]


@pytest.mark.parametrize(("overrides", "pool"), [(MAE, "mean_norm"), (DINO, "cls")])
def test_of_mae_takes_the_mean_of_the_patches(
    run_yaml: Callable[[str], Path], overrides: list[str], pool: str
) -> None:
    config = load_run(run_yaml("pre"), overrides)
    source = open_training_source(config.data, config.evaluate, config.method)
    run = finetune_run(config, FinetuneConfig(), folder=RunFolder(Path("runs/pre")), source=source)
    assert (run.backbone.pool, run.backbone.batch_norm) == (pool, "worker")
    assert run.backbone.weights == str(Path("runs/pre/encoder.safetensors").absolute())
