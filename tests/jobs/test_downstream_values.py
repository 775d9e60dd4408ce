"""The settings of the next run follow from the last one's, the papers' where nothing is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.config.load import to_yaml
from raysl.encoder import save_encoder
from raysl.errors import ConfigError, DataError
from raysl.jobs.downstream import distill_from, distill_values, finetune_from, finetune_values
from raysl.jobs.downstream import origin_of as of
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.classifier import save_head
from raysl.nn.heads import projection_mlp
from raysl.recipe import RunConfig, run_from_values

FOLDER = Path("/runs/base")


def pretraining(**sections: Any) -> RunConfig[Any]:
    views = {"recipe": "simclr", "size_px": 32, "min_scale": 0.2}
    values: dict[str, Any] = {
        "name": "base",
        "data": {"source": "digits", "views": views, "mean": [0.5, 0.5, 0.5]},
        "backbone": {"name": "resnet18", "stem": "small"},
        "method": {"name": "simclr", "projection_layers": 3},
        "train": {"epochs": 1.0, "precision": "bf16"},
    }
    return run_from_values(values | sections, where="test")


def finetune(*overrides: str, **sections: Any) -> RunConfig[Any]:
    values = finetune_from(of(pretraining(**sections), FOLDER), overrides)
    return run_from_values(values, where="finetune")


class TestFinetune:
    def test_is_simclr_v2_s_with_one_percent(self) -> None:
        config = finetune("data.labels.fraction=0.01")
        assert config.method.head_layers == 1
        assert config.method.head == str(FOLDER)
        assert config.backbone.weights == str(FOLDER / "encoder.safetensors")
        optim = config.optim
        assert (optim.name, optim.lr_scaling, optim.weight_decay) == ("lars", "sqrt", 0.0)
        assert optim.base_lr == pytest.approx(0.005 * 256**0.5)
        assert optim.warmup.epochs == 0
        assert config.train.epochs == 60
        assert config.name == "base-finetuned-1percent-layer1"
        assert config.data.labels is not None
        assert config.data.labels.only

    def test_a_tenth_is_seen_half_as_often_and_all_labels_keep_no_head(self) -> None:
        assert finetune("data.labels.fraction=0.1").train.epochs == 30
        assert finetune().method.head_layers == 0
        assert finetune().name == "base-finetuned"

    def test_a_head_of_two_layers_is_left_behind(self) -> None:
        config = finetune("data.labels.fraction=0.1", method={"name": "simclr"})
        assert config.method.head_layers == 0

    def test_wide_networks_learn_more_slowly(self) -> None:
        wide = {"name": "resnet18", "stem": "small", "width": 2.0}
        assert finetune(backbone=wide).optim.base_lr == pytest.approx(0.002 * 16)

    def test_a_batch_is_as_large_as_the_labels_allow(self) -> None:
        assert finetune().train.global_batch_size == 1024
        assert finetune("data.labels.fraction=0.1").train.global_batch_size == 135
        odd = finetune("data.labels.fraction=0.1", "cluster.num_train_workers=4")
        assert odd.train.global_batch_size == 132

    def test_images_normalisation_and_crops_are_those_of_the_pretraining(self) -> None:
        config = finetune()
        assert config.data.mean == (0.5, 0.5, 0.5)
        (view,) = config.data.views.views()
        assert (view.count, view.size_px, view.crop.scale[0]) == (1, 32, 0.2)
        assert [op.op for op in view.ops] == ["flip"]
        assert config.train.precision == "bf16"
        plain = {"recipe": "custom", "kinds": [{"count": 2, "size_px": 32, "ops": []}]}
        upright = finetune(data={"source": "digits", "views": plain})
        assert upright.data.views.views()[0].ops == ()

    def test_overrides_win(self) -> None:
        config = finetune("optim.name=adamw", "train.steps=7", "name=mine", "method.head_layers=2")
        assert (config.optim.name, config.optim.base_lr) == ("adamw", 0.03)  # no LARS's rate
        assert (config.train.steps, config.train.epochs) == (7, None)
        assert (config.name, config.method.head_layers) == ("mine", 2)

    def test_a_vit_is_fine_tuned_as_mae_s(self) -> None:
        vit = {"name": "vit_tiny", "patch_size_px": 8}
        config = finetune(backbone=vit, method={"name": "simclr"})
        assert (config.optim.name, config.optim.layer_decay) == ("adamw", 0.65)
        assert (config.method.mixup, config.method.cutmix) == (0.8, 1.0)
        assert config.backbone.drop_path == 0.1

    def test_more_layers_than_the_head_has_are_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"ends at layer 3; use at most 3"):
            finetune("method.head_layers=4")


class TestDistill:
    def distill(self, *overrides: str) -> RunConfig[Any]:
        teacher = finetune("data.labels.fraction=0.1", "data.labels.seed=3")
        values = distill_from(of(teacher, Path("/runs/tuned")), overrides)
        return run_from_values(values, where="distill")

    def test_is_simclr_v2_s(self) -> None:
        config = self.distill()
        assert config.method.teacher == "/runs/tuned"
        assert (config.method.temperature, config.method.distillation_weight) == (0.1, 1.0)
        assert config.backbone.weights is None
        assert config.train.epochs == 400
        assert config.train.global_batch_size == 1347  # all images, not those with labels
        assert config.optim.base_lr == pytest.approx(0.1 * 256**0.5)
        assert (config.optim.weight_decay, config.optim.warmup.fraction) == (1e-4, 0.05)
        assert config.data.labels is not None
        assert (config.data.labels.only, config.data.labels.seed) == (False, 3)

    def test_another_architecture_has_temperature_one_and_its_name(self) -> None:
        config = self.distill("backbone.width=0.5")
        assert config.method.temperature == 1.0
        assert config.name == "base-finetuned-10percent-layer1-distilled-resnet18-0.5x"
        assert self.distill("method.temperature=2.0").method.temperature == 2.0


class TestFiles:
    def test_an_encoder_in_no_run_folder_needs_images_and_takes_a_head_beside_it(
        self, tmp_path: Path
    ) -> None:
        backbone = BackboneConfig(name="resnet18", stem="small", width=0.125)
        torch.manual_seed(0)
        encoder = build_backbone(backbone)
        about = {"backbone": backbone.model_dump(mode="json"), "image_size_px": 48}
        path = tmp_path / "found.safetensors"
        save_encoder(path, encoder, description=about | {"mean": [0.1] * 3, "std": [0.2] * 3})
        with pytest.raises(ConfigError, match=r"data\.source: this encoder lies in no run folder"):
            finetune_values(path)
        head = projection_mlp(encoder.embed_dim, 8, 8, num_layers=2)
        save_head(tmp_path / "projection_head.safetensors", head, description={})
        values = finetune_values(path, ["data.source=digits", "method.head_layers=1"])
        config = run_from_values(values, where="test")
        assert config.backbone.width == 0.125
        assert config.data.mean == (0.1, 0.1, 0.1)
        assert config.image_size_px == 48
        assert config.method.head == str(tmp_path)
        assert config.backbone.weights == str(path)

    def test_a_folder_without_a_finished_run_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text(to_yaml(pretraining().model_dump(mode="json")))
        with pytest.raises(DataError, match="no finished run and no encoder file"):
            finetune_values(tmp_path)
        with pytest.raises(DataError, match=r"no run with a classifier\.safetensors in it"):
            distill_values(tmp_path)
