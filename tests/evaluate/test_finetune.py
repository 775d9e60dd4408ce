import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raysl.errors import ConfigError, DivergedError
from raysl.evaluate.features import EvalImages
from raysl.evaluate.finetune import FinetuneConfig, Finetuned, balanced_subset, finetune
from raysl.nn.backbones import Backbone
from raysl.nn.batchnorm import BatchNormScope, set_batch_norm_scope
from raysl.nn.heads import projection_mlp
from raysl.optim.build import ScheduledOptimizer, scheduled_optimizer
from raysl.sources.source import ArraySource

SIZE_PX = 8
CLASSES = 3


def striped(n: int, *, seed: int) -> EvalImages:
    """Images whose class is their hue: one channel is bright, behind noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    pixels = rng.integers(0, 150, (n, 10, 12, 3))
    pixels[np.arange(n), :, :, labels] += 60
    source = ArraySource("striped", pixels.astype(np.uint8))
    rows = np.arange(n)[::-1].copy()  # places are not rows
    return EvalImages(source, rows, labels[rows], size_px=SIZE_PX, crop_fraction=1.0, num_threads=2)


def to_input(pixels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def encoder_and_head(*, num_layers: int = 3) -> tuple[Backbone, nn.Sequential]:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone(net, embed_dim=8), projection_mlp(8, 7, 5, num_layers=num_layers)


def run(
    parts: tuple[Backbone, nn.Sequential | None] | None = None,
    *,
    to_input: Callable[[npt.NDArray[np.uint8]], Tensor] = to_input,
    **settings: Any,
) -> Finetuned:
    encoder, head = parts or encoder_and_head()
    settings = {"label_fraction": 0.5, "epochs": 12, "batch_size": 16, "base_lr": 2.0} | settings
    return finetune(
        encoder,
        head,
        FinetuneConfig(**settings),
        train=striped(120, seed=0),
        test=striped(60, seed=1),
        num_classes=CLASSES,
        to_input=to_input,
    )


def num_of_each(labels: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> list[int]:
    return np.bincount(labels[places]).tolist()


class TestBalancedSubset:
    LABELS = np.repeat([0, 1, 2], [500, 300, 100])

    @pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
    def test_takes_as_many_of_each_class_though_some_are_larger(self, fraction: float) -> None:
        places = balanced_subset(self.LABELS, fraction=fraction, seed=0)
        assert num_of_each(self.LABELS, places) == [round(fraction * 900) // 3] * 3

    def test_what_does_not_divide_goes_to_some_classes(self) -> None:
        counts = num_of_each(self.LABELS, balanced_subset(self.LABELS, fraction=20 / 900, seed=0))
        assert sorted(counts) == [6, 7, 7]

    def test_a_class_that_is_too_small_is_taken_whole_and_the_others_fill_up(self) -> None:
        places = balanced_subset(self.LABELS, fraction=0.5, seed=0)
        assert num_of_each(self.LABELS, places) == [175, 175, 100]
        places = balanced_subset(self.LABELS, fraction=0.9, seed=0)
        assert num_of_each(self.LABELS, places) == [410, 300, 100]

    def test_all_of_them_are_all(self) -> None:
        places = balanced_subset(self.LABELS, fraction=1.0, seed=0)
        assert places.tolist() == list(range(900))

    def test_one_percent_of_few_images_still_has_every_class(self) -> None:
        labels = np.arange(100) % 10
        assert num_of_each(labels, balanced_subset(labels, fraction=0.01, seed=0)) == [1] * 10

    def test_is_a_function_of_the_seed_in_order_and_without_repetition(self) -> None:
        first = balanced_subset(self.LABELS, fraction=0.1, seed=3)
        assert np.array_equal(first, balanced_subset(self.LABELS, fraction=0.1, seed=3))
        assert not np.array_equal(first, balanced_subset(self.LABELS, fraction=0.1, seed=4))
        assert (np.diff(first) > 0).all()

    def test_a_smaller_part_lies_within_a_larger_one(self) -> None:
        parts = [set(balanced_subset(self.LABELS, fraction=f, seed=0)) for f in (0.01, 0.1, 0.5)]
        assert parts[0] < parts[1] < parts[2]

    def test_class_numbers_may_have_gaps(self) -> None:
        labels = np.array([7, 7, 7, 2, 2, 2])
        assert sorted(labels[balanced_subset(labels, fraction=0.4, seed=0)]) == [2, 7]


class TestFinetune:
    @pytest.mark.parametrize("head_layers", [0, 1, 3])
    def test_learns_classes_that_can_be_told_apart(self, head_layers: int) -> None:
        assert run(head_layers=head_layers).top1 > 0.9

    def test_says_which_rows_it_saw_and_they_are_those_of_the_seed(self) -> None:
        train = striped(120, seed=0)
        found = run(label_fraction=0.1, epochs=1, seed=5)
        places = balanced_subset(train.labels, fraction=0.1, seed=5)
        assert found.rows == sorted(train.rows[places].tolist())
        assert found.rows == run(label_fraction=0.1, epochs=1, head_layers=2, seed=5).rows
        assert found.rows != run(label_fraction=0.1, epochs=1, seed=6).rows

    def test_looks_at_no_other_training_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown: set[int] = set()
        original = EvalImages.image

        def image(images: EvalImages, place: int) -> Any:
            if len(images) == 120:
                shown.add(int(images.rows[place]))
            return original(images, place)

        monkeypatch.setattr(EvalImages, "image", image)
        found = run(label_fraction=0.4, epochs=3)
        assert shown == set(found.rows)

    def test_leaves_encoder_head_and_random_numbers_as_they_are(self) -> None:
        encoder, head = encoder_and_head()
        encoder.requires_grad_(False)  # as DINO's teacher is
        before = copy.deepcopy([encoder.state_dict(), head.state_dict()])
        torch.manual_seed(9)
        expected = torch.rand(3)
        torch.manual_seed(9)
        assert run((encoder, head), head_layers=2).top1 > 0.9
        assert torch.equal(torch.rand(3), expected)
        for module, state in zip((encoder, head), before, strict=True):
            for name, value in module.state_dict().items():
                assert torch.equal(value, state[name]), name
        assert not any(p.requires_grad for p in encoder.parameters())
        assert all(p.grad is None for p in (*encoder.parameters(), *head.parameters()))
        assert encoder.training

    def test_is_the_same_every_time_and_another_with_another_seed(self) -> None:
        def first_input(seed: int) -> Tensor:
            seen: list[Tensor] = []

            def note(pixels: npt.NDArray[np.uint8]) -> Tensor:
                seen.append(to_input(pixels))
                return seen[-1]

            run(epochs=1, seed=seed, to_input=note)
            return seen[0]

        assert torch.equal(first_input(1), first_input(1))
        assert not torch.equal(first_input(1), first_input(2))
        assert run(epochs=2).top1 == run(epochs=2).top1

    def test_its_optimizer_is_simclrs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """SGD with Nesterov momentum, 0.05 times B / 256, no weight decay, half a cosine."""
        built: list[ScheduledOptimizer] = []

        def build(*arguments: Any, **sizes: Any) -> ScheduledOptimizer:
            built.append(scheduled_optimizer(*arguments, **sizes))
            return built[-1]

        monkeypatch.setattr("raysl.evaluate.finetune.scheduled_optimizer", build)
        run(epochs=4, batch_size=30, base_lr=0.05)  # 60 images: 8 steps
        optimizer = built[0]
        assert isinstance(optimizer.optimizer, torch.optim.SGD)
        for group in optimizer.optimizer.param_groups:
            assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.9, 0.0)
        rates = [optimizer.rates(step).lr for step in (0, 4, 8)]
        assert rates == pytest.approx([0.05 * 30 / 256, 0.025 * 30 / 256, 0.0])

    def test_every_epoch_is_full_batches_of_other_crops(self) -> None:
        seen: list[Tensor] = []

        def note(pixels: npt.NDArray[np.uint8]) -> Tensor:
            seen.append(to_input(pixels))
            return seen[-1]

        run(epochs=2, label_fraction=0.3, batch_size=16, to_input=note)  # 36 images
        training, test = seen[:4], seen[4:]
        assert [len(batch) for batch in training] == [16] * 4
        assert sum(len(batch) for batch in test) == 60
        assert len(torch.cat(training).flatten(1).unique(dim=0)) == 64

    def test_fewer_images_than_a_batch_are_one_batch(self) -> None:
        seen: list[int] = []

        def note(pixels: npt.NDArray[np.uint8]) -> Tensor:
            seen.append(len(pixels))
            return to_input(pixels)

        run(epochs=2, label_fraction=0.05, batch_size=256, to_input=note)
        assert seen[:2] == [6, 6]

    @pytest.mark.parametrize("scope", ["sync", "split"])
    def test_takes_batch_norm_over_its_own_batch_whatever_the_pretraining_had(
        self, scope: BatchNormScope
    ) -> None:
        """Other ranks wait meanwhile, and six images do not divide into four parts."""
        plain = run(label_fraction=0.05, epochs=2)
        encoder, head = encoder_and_head()
        set_batch_norm_scope(encoder, scope, num_splits=4)
        set_batch_norm_scope(head, scope, num_splits=4)
        assert run((encoder, head), label_fraction=0.05, epochs=2) == plain

    def test_keeps_the_head_where_it_stood(self) -> None:
        """A head that lets nothing through leaves nothing to learn from; the encoder alone does."""
        encoder, head = encoder_and_head()
        nn.init.zeros_(head[1].weight)  # batch norm of layer 1: all features are its bias
        with torch.no_grad():
            head[1].bias.fill_(-1e3)  # and below zero, where ReLU has no gradient
        assert run((encoder, head), head_layers=1).top1 < 0.5
        assert run((encoder, head), head_layers=0).top1 > 0.9

    def test_a_method_without_a_head_has_only_its_encoder(self) -> None:
        encoder, _ = encoder_and_head()
        assert run((encoder, None)).top1 > 0.9
        with pytest.raises(ConfigError, match="1 layers of a head that has 0"):
            run((encoder, None), head_layers=1)

    def test_more_layers_than_the_head_has_are_an_error(self) -> None:
        with pytest.raises(ConfigError, match="4 layers of a head that has 3"):
            run(head_layers=4)

    def test_a_loss_that_is_not_finite_is_an_error_that_names_the_setting(self) -> None:
        with pytest.raises(DivergedError, match=r"lower evaluate\.finetune\.base_lr=1e\+30"):
            run(base_lr=1e30, head_layers=3)


class TestFinetuneConfig:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"label_fraction": 0.0},
            {"label_fraction": 1.5},
            {"head_layers": -1},
            {"epochs": 0},
            {"batch_size": 1},
            {"sgd_momentum": 0.0},
            {"min_scale": 0.0},
        ],
    )
    def test_refuses_what_makes_no_sense(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            FinetuneConfig(**wrong)

    def test_a_dump_loads_again(self) -> None:
        config = FinetuneConfig(label_fraction=0.01, head_layers=1, epochs=60)
        assert FinetuneConfig.model_validate(config.model_dump()) == config
