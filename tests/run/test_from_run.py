import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysl.config.load import validate
from raysl.config.yaml_text import to_yaml
from raysl.errors import ConfigError, DataError
from raysl.evaluate.training_source import open_training_source
from raysl.nn.backbones import build_backbone
from raysl.nn.classifier import HEAD_FILE, Classifier, save_classifier, save_head
from raysl.nn.heads import projection_mlp
from raysl.run.build import describe
from raysl.run.from_run import (
    distill_from,
    distill_values,
    finetune_data,
    finetune_from,
    finetune_values,
    origin_of,
    run_after,
)
from raysl.run.places import dropped_settings_note
from raysl.run.recipe import RunConfig, derive_for, load_run, run_from_values
from raysl.sources.source import DataConfig
from raysl.track.run_folder import RunFolder

SMALL = ["backbone={name: resnet18, stem: small, width: 0.125}"]
VIT = [
    "backbone={name: vit_tiny, patch_size_px: 8, depth: 2}",
    "data.views={recipe: mae, size_px: 32}",
    "method={name: mae, decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}",
    "optim={name: adamw, base_lr: 1.0e-3}",
]
TEN_PERCENT = "data.labels.fraction=0.1"

Make = Callable[..., Path]


@pytest.fixture
def pretrained(run_yaml: Callable[[str], Path]) -> Make:
    """Make the folder of a finished pretraining, with a projection head of so many layers."""

    def make(*overrides: str, head_layers: int = 3) -> Path:
        config = load_run(run_yaml("pre"), [*SMALL, *overrides])
        folder = RunFolder(Path("runs/pre"))
        folder.path.mkdir(parents=True)
        folder.config.write_text(to_yaml(config.model_dump(mode="json")))
        folder.encoder.touch()  # of a run, its configuration is all that is read
        if head_layers:
            head = projection_mlp(8, 7, 5, num_layers=head_layers)
            save_head(folder.projection_head, head, description={})
        return folder.path

    return make


@pytest.fixture
def finetuned(run_yaml: Callable[[str], Path]) -> Make:
    """Make the folder of a finished run of method supervised, on 10 % of the labels."""

    def make(*overrides: str) -> Path:
        labels = "data.labels={fraction: 0.1, only: true}"
        given = ["data.views={recipe: finetune, size_px: 32}", "method={name: supervised}"]
        given += ["train.global_batch_size=16", "evaluate.every=null", labels]
        config = load_run(run_yaml("teacher"), [*SMALL, *given, *overrides])
        folder = RunFolder(Path("runs/teacher"))
        folder.path.mkdir(parents=True)
        folder.config.write_text(to_yaml(config.model_dump(mode="json")))
        encoder = build_backbone(config.backbone, image_size_px=32)
        model = Classifier(encoder, nn.Sequential(), [str(number) for number in range(10)])
        save_classifier(folder.classifier, model, description=describe(config))
        return folder.path

    return make


def finetune(origin: Path, *overrides: str) -> RunConfig[Any]:
    return run_from_values(finetune_values(origin, overrides), where="test")


def distill(teacher: Path, *overrides: str) -> RunConfig[Any]:
    return run_from_values(distill_values(teacher, overrides), where="test")


def peak_lr(run: RunConfig[Any]) -> float:
    source = open_training_source(run.data, run.evaluate, run.method)
    return derive_for(run, source).peak_lr


class TestFinetune:
    @pytest.mark.parametrize(("fraction", "epochs"), [(0.01, 60), (0.1, 30), (1.0, 30)])
    def test_few_labels_are_seen_more_often(
        self, pretrained: Make, fraction: float, epochs: int
    ) -> None:
        run = finetune(pretrained(), f"data.labels.fraction={fraction}")
        assert (run.train.epochs, run.train.steps) == (epochs, None)

    @pytest.mark.parametrize(
        ("layers", "fraction", "kept"),
        [(3, 0.1, 1), (3, 0.01, 1), (4, 0.1, 1), (3, 1.0, 0), (2, 0.1, 0), (1, 0.01, 0)],
    )
    def test_the_first_layer_of_a_deep_head_stays_where_labels_are_few(
        self, pretrained: Make, layers: int, fraction: float, kept: int
    ) -> None:
        folder = pretrained(head_layers=layers)
        method = finetune(folder, f"data.labels.fraction={fraction}").method
        assert (method.head_layers, method.head) == (kept, str(folder))

    def test_a_run_without_a_head_has_none(self, pretrained: Make) -> None:
        method = finetune(pretrained(head_layers=0), TEN_PERCENT).method
        assert (method.head_layers, method.head) == (0, None)

    @pytest.mark.parametrize(
        ("backbone", "per_root"),
        [
            ([], 0.005),
            (["backbone.width=2.0"], 0.002),
            (["backbone.name=resnet50", "backbone.selective_kernels=true"], 0.002),
        ],
    )
    def test_lars_has_a_rate_that_grows_with_the_root_of_the_batch(
        self, pretrained: Make, backbone: list[str], per_root: float
    ) -> None:
        folder = pretrained(*backbone)
        for more, batch in ([], 160), (["train.global_batch_size=40"], 40):
            run = finetune(folder, *more)
            assert run.train.global_batch_size == batch
            assert peak_lr(run) == pytest.approx(per_root * math.sqrt(batch))
            assert (run.optim.name, run.optim.weight_decay) == ("lars", 0)
            assert run.optim.warmup.in_steps(steps_per_epoch=10, total_steps=300) == 0

    def test_a_vit_is_fine_tuned_as_maes(self, pretrained: Make) -> None:
        origin = pretrained(*VIT, head_layers=0)
        run = finetune(origin)
        assert (run.optim.name, run.optim.base_lr) == ("adamw", 5e-4)
        assert (run.optim.weight_decay, run.optim.layer_decay) == (0.05, 0.65)
        assert run.optim.warmup.epochs == 5
        short = finetune(origin, "train.epochs=5")
        assert short.optim.warmup.fraction == 0.05  # not the whole run
        method = run.method
        assert (method.label_smoothing, method.mixup, method.cutmix) == (0.1, 0.8, 1.0)
        assert (run.backbone.drop_path, run.train.epochs) == (0.1, 100)

    def test_of_mae_takes_the_mean_of_the_patches_where_all_of_it_learns(
        self, pretrained: Make
    ) -> None:
        # FINETUNE.md: --global_pool is the default of main_finetune.py:115; main_linprobe.py:73
        # has the class token.
        folder = pretrained(*VIT, head_layers=0)
        assert load_run(folder / "config.yaml", []).backbone.pool == "cls"
        assert finetune(folder).backbone.pool == "mean_norm"
        assert finetune(folder, TEN_PERCENT).backbone.pool == "mean_norm"
        assert finetune(folder, "method.freeze_encoder=true").backbone.pool == "cls"
        assert finetune(folder, "backbone.pool=mean").backbone.pool == "mean"

    def test_of_other_vits_keeps_the_class_token(self, pretrained: Make) -> None:
        dino = ["method={name: dino, num_prototypes: 16}", "data.views={recipe: dino, size_px: 32}"]
        more = ["data.views.local_size_px=16"]
        run = finetune(pretrained(*VIT[:1], *dino, *more, VIT[-1], head_layers=0))
        assert run.backbone.pool == "cls"

    def test_overrides_win(self, pretrained: Make) -> None:
        run = finetune(
            pretrained(),
            TEN_PERCENT,
            "name=mine",
            "train.epochs=7",
            "train.global_batch_size=5",
            "method.head_layers=2",
            "optim.base_lr=0.25",
            "data.views.min_scale=0.9",
        )
        assert (run.name, run.train.epochs, run.train.global_batch_size) == ("mine", 7, 5)
        assert (run.method.head_layers, run.optim.base_lr) == (2, 0.25)
        assert run.optim.lr_scaling == "sqrt"  # the rest of the section stays
        assert run.data.views.model_dump()["min_scale"] == 0.9
        assert run.data.labels is not None
        assert (run.data.labels.fraction, run.data.labels.only) == (0.1, True)

    def test_overrides_win_over_what_a_vit_gets(self, pretrained: Make) -> None:
        more = ["backbone.drop_path=0.3", "method.mixup=0", "optim.layer_decay=0.9"]
        run = finetune(pretrained(*VIT, head_layers=0), *more)
        assert (run.backbone.drop_path, run.method.mixup, run.method.cutmix) == (0.3, 0, 1.0)
        assert (run.optim.layer_decay, run.optim.weight_decay) == (0.9, 0.05)

    def test_another_optimizer_takes_nothing_of_lars(self, pretrained: Make) -> None:
        run = finetune(pretrained(), "optim={name: adamw, base_lr: 0.002}")
        bare = load_run(Path("pre.yaml"), ["optim={name: adamw, base_lr: 0.002}"])
        assert run.optim == bare.optim

    def test_steps_take_the_place_of_epochs(self, pretrained: Make) -> None:
        run = finetune(pretrained(), "train.steps=9")
        assert (run.train.steps, run.train.epochs) == (9, None)

    def test_the_batch_is_no_larger_than_the_labels_and_divides_among_workers(
        self, pretrained: Make
    ) -> None:
        folder = pretrained()
        assert finetune(folder, TEN_PERCENT).train.global_batch_size == 16
        few = ["data.labels.fraction=0.2", "cluster.num_train_workers=3"]
        assert finetune(folder, *few).train.global_batch_size == 30  # of 32
        few[1] = "cluster.num_train_workers={min: 2, max: 5}"
        found = finetune(folder, *few)
        assert found.train.global_batch_size == 30
        assert found.worker_counts == (2, 3, 5)
        assert finetune(folder, "data.limit=null").train.global_batch_size == 1024

    def test_goes_on_from_the_runs_encoder_images_and_place(self, pretrained: Make) -> None:
        folder = pretrained("seed=5", "evaluate.final=[knn,finetune]", "data.limit=150")
        run = finetune(folder, TEN_PERCENT)
        assert run.backbone.weights == str(folder / "encoder.safetensors")
        assert (run.backbone.stem, run.backbone.width) == ("small", 0.125)
        assert (run.data.source, run.data.limit, run.seed) == ("digits", 150, 5)
        assert run.evaluate.trained == ()  # that was about the end of the pretraining
        assert run.name == "pre-finetuned-10percent-layer1"
        assert Path(run.output_dir) == folder.parent
        assert finetune(folder).name == "pre-finetuned"

    def test_other_images_take_nothing_of_the_old_ones(
        self, pretrained: Make, photos: Path
    ) -> None:
        more = f"data.mix=[{{source: {photos}}}]"
        rest = ["data.limit=150", "evaluate.limit=9", "evaluate.source=digits", "data.mean=[0,0,0]"]
        folder = pretrained(more, *rest, "evaluate.split=test")
        assert len(finetune(folder).data.mix) == 1
        run = finetune(folder, f"data.source={photos}")
        assert (run.data.source, run.data.mix, run.data.limit) == (str(photos), (), None)
        assert (run.evaluate.source, run.evaluate.limit, run.evaluate.split) == (None, None, None)
        assert run.data.mean == (0, 0, 0)  # as the encoder sees images
        run = finetune(folder, f"evaluate.source={photos}")
        assert (run.data.limit, run.evaluate.limit, run.evaluate.split) == (150, None, None)
        run = finetune(folder, "data.source=digits", "data.limit=100")  # the same images
        assert (run.data.limit, len(run.data.mix), run.evaluate.limit) == (100, 1, 9)
        note = dropped_settings_note(folder, [f"data.source={photos}"], test_key="evaluate.source")
        assert "data.limit=150, data.mix=[{" in note
        assert "evaluate.source=digits, evaluate.limit=9, evaluate.split=test" in note

    def test_a_run_that_is_not_finished_yet_gives_the_same_values(self, pretrained: Make) -> None:
        folder = pretrained("method.projection_layers=3")
        config = load_run(folder / "config.yaml", [])
        planned = finetune_from(origin_of(config, folder), [TEN_PERCENT])
        assert planned == finetune_values(folder, [TEN_PERCENT])

    def test_an_encoder_file_alone_says_all_it_knows(
        self, tiny_encoder: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = tiny_encoder("lone")
        torch.manual_seed(0)
        save_head(path.with_name(HEAD_FILE), projection_mlp(8, 7, 5, num_layers=3), description={})
        run = finetune(path, "data.source=digits", "data.limit=100", TEN_PERCENT)
        assert (run.image_size_px, run.backbone.width) == (16, 0.125)
        assert (run.data.mean, run.data.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
        assert (run.backbone.weights, run.method.head_layers) == (str(path), 1)
        assert run.train.global_batch_size == 10


class TestFinetuneData:
    def views(self, run_yaml: Callable[[str], Path], *overrides: str) -> dict[str, Any]:
        found: dict[str, Any] = finetune_data(load_run(run_yaml("pre"), overrides))["views"]
        return found

    def test_mirrors_nothing_where_pretraining_did_not(
        self, run_yaml: Callable[[str], Path]
    ) -> None:
        found = self.views(run_yaml)
        assert (found["recipe"], found["flip_prob"], found["min_scale"]) == ("finetune", 0.0, 0.5)

    def test_mirrors_and_crops_as_pretraining_did(self, run_yaml: Callable[[str], Path]) -> None:
        found = self.views(run_yaml, "data.views={recipe: simclr, size_px: 32, min_scale: 0.3}")
        assert "flip_prob" not in found  # the recipe's own
        assert (found["size_px"], found["min_scale"]) == (32, 0.3)
        assert found["interpolation"] == "bicubic"
        found = self.views(run_yaml, "data.views={recipe: moco_v2, size_px: 32, antialias: false}")
        assert (found["interpolation"], found["antialias"]) == ("bilinear", False)

    def test_of_several_crops_the_largest_counts(self, run_yaml: Callable[[str], Path]) -> None:
        large = "{count: 2, size_px: 32, crop: {scale: [0.4, 1.0]}}"
        small = "{count: 2, size_px: 16, crop: {scale: [0.1, 0.4]}}"
        crops = f"data.views.kinds=[{large}, {small}]"
        found = self.views(run_yaml, crops, "method={name: swav, num_prototypes: 10}")
        assert (found["size_px"], found["min_scale"]) == (32, 0.4)

    def test_leaves_the_accelerator_no_operation_where_nothing_is_mirrored(
        self, run_yaml: Callable[[str], Path]
    ) -> None:
        ops = "data.views.kinds.0.ops=[{op: color_jitter}]"
        run = load_run(run_yaml("pre"), [ops, "data.color_on=device"])
        found = validate(DataConfig, finetune_data(run), where="test")
        assert (found.color_on, found.views.views()[0].ops) == ("cpu", ())


class TestFinetuneMistakes:
    def test_a_folder_without_an_encoder(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"neither a finished run nor an encoder file; give a run"
        ):
            finetune_values(tmp_path)
        with pytest.raises(DataError, match=r"nowhere\.safetensors: neither a finished run"):
            finetune_values(tmp_path / "nowhere.safetensors")

    def test_more_layers_than_the_head_has(self, pretrained: Make) -> None:
        folder = pretrained(head_layers=2)
        with pytest.raises(ConfigError, match=r"head_layers=3.* ends at layer 2; use at most 2"):
            finetune_values(folder, ["method.head_layers=3"])
        with pytest.raises(ConfigError, match="head_layers=1"):
            finetune(pretrained_without_head(folder), "method.head_layers=1")

    def test_an_encoder_file_alone_needs_images(self, tiny_encoder: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match=r"set data\.source=\.\.\. to labelled images"):
            finetune_values(tiny_encoder("lone"))

    def test_images_without_labels(self, pretrained: Make, tmp_path: Path) -> None:
        import cv2
        import numpy as np

        (tmp_path / "bare").mkdir()
        for number in range(4):
            image = np.full((8, 8, 3), number, dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "bare" / f"{number}.png"), image)
        overrides = [f"data.source={tmp_path / 'bare'}", "data.limit=null"]
        with pytest.raises(DataError, match="needs labels"):
            finetune_values(pretrained(), overrides)

    def test_a_wrong_key_is_answered_with_the_nearest(self, pretrained: Make) -> None:
        with pytest.raises(ConfigError, match="did you mean 'freeze_encoder'"):
            finetune(pretrained(), "method.freeze_encodr=true")


def pretrained_without_head(folder: Path) -> Path:
    (folder / HEAD_FILE).unlink()
    return folder


class TestLabelsLeftOut:
    """What was pretrained with data.labels=none may be fine-tuned with the labels there are."""

    def test_fine_tuning_sees_them_unless_it_is_told_otherwise(self, pretrained: Make) -> None:
        origin = pretrained("data.labels=none")
        run = finetune(origin)
        assert not isinstance(run.data.labels, str)
        assert run.data.labels is not None
        assert run.data.labels.fraction == 1.0
        with pytest.raises(DataError, match=r"has none: data\.labels=none leaves them out"):
            finetune(origin, "data.labels=none")

    def test_a_student_needs_none(self, finetuned: Make) -> None:
        assert distill(finetuned(), "data.labels=none").data.labels == "none"


class TestDistill:
    def test_a_student_of_the_same_size_is_simclr_v2s(self, finetuned: Make) -> None:
        teacher = finetuned()
        run = distill(teacher)
        assert (run.method.name, run.method.teacher) == ("distill", str(teacher))
        assert (run.method.temperature, run.method.distillation_weight) == (0.1, 1.0)
        assert (run.backbone.weights, run.backbone.width) == (None, 0.125)
        assert (run.train.epochs, run.name) == (400, "teacher-distilled")

    @pytest.mark.parametrize(
        ("other", "name"),
        [
            ("backbone.width=0.25", "teacher-distilled-resnet18-0.25x"),
            ("backbone={name: resnet34, stem: small}", "teacher-distilled-resnet34"),
        ],
    )
    def test_another_student_is_taught_at_temperature_one(
        self, finetuned: Make, other: str, name: str
    ) -> None:
        run = distill(finetuned(), other)
        assert (run.method.temperature, run.name) == (1.0, name)

    def test_how_it_is_trained_does_not_make_it_another(self, finetuned: Make) -> None:
        more = ["backbone.batch_norm=worker", "backbone.drop_path=0.0"]
        assert distill(finetuned(), *more).method.temperature == 0.1

    def test_all_images_are_seen_with_pretrainings_optimizer(self, finetuned: Make) -> None:
        run = distill(finetuned())
        assert run.data.labels is not None
        assert not run.data.labels.only
        assert run.train.global_batch_size == 160
        assert peak_lr(run) == pytest.approx(0.1 * math.sqrt(160))
        assert (run.optim.name, run.optim.weight_decay) == ("lars", 1e-4)
        assert run.optim.warmup.in_steps(steps_per_epoch=1, total_steps=400) == 20

    def test_with_labels_that_count_it_sees_those_of_the_teacher(self, finetuned: Make) -> None:
        run = distill(finetuned(), "method.distillation_weight=0.5")
        labels = open_training_source(run.data, run.evaluate, run.method).labels()
        assert labels is not None
        assert (len(labels), int((labels >= 0).sum())) == (160, 16)

    def test_overrides_win(self, finetuned: Make) -> None:
        more = ["method.temperature=3", "train.epochs=2", "train.global_batch_size=20", "name=s"]
        run = distill(finetuned(), *more, "optim={name: sgd, base_lr: 0.5}")
        assert (run.method.temperature, run.train.epochs, run.name) == (3, 2, "s")
        assert (run.train.global_batch_size, run.optim.name) == (20, "sgd")
        assert run.optim.base_lr == 0.5

    def test_a_teacher_that_is_not_finished_yet_gives_the_same_values(
        self, finetuned: Make
    ) -> None:
        folder = finetuned()
        config = load_run(folder / "config.yaml", [])
        assert distill_from(origin_of(config, folder), []) == distill_values(folder)

    @pytest.mark.parametrize("kept", [[], ["config.yaml"], ["classifier.safetensors"]])
    def test_a_teacher_needs_its_classifier_and_its_settings(
        self, finetuned: Make, kept: Sequence[str]
    ) -> None:
        folder = finetuned()
        for path in list(folder.iterdir()):
            if path.name not in kept:
                path.unlink()
        with pytest.raises(DataError, match=r"no run with a classifier\.safetensors in it"):
            distill_values(folder)

    def test_a_damaged_classifier_is_told_before_anything_starts(self, finetuned: Make) -> None:
        path = finetuned() / "classifier.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataError, match=r"classifier\.safetensors"):
            distill_values(path.parent)


class TestRunAfter:
    def test_what_the_next_run_has_no_use_for_stays_behind(self, pretrained: Make) -> None:
        given = ("evaluate.final=[finetune]", "data.bad_images.policy=fail")
        values = finetune_values(pretrained(*given))
        values["data"]["bad_images"]["max_share"] = 0.5
        run = run_after(values, [], where="test")
        assert (run.evaluate.trained, run.data.bad_images.max_share) == ((), 0.01)

    def test_what_is_asked_for_has_to_be_of_use(self, pretrained: Make) -> None:
        override = "optim={name: adamw, sgd_momentum: 0.5}"
        values = finetune_values(pretrained(), [override])
        with pytest.raises(ConfigError, match=r"optim\.sgd_momentum=0\.5 does nothing with"):
            run_after(values, [override], where="test")
