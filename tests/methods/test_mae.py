from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raysl.config.base import Config
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.mae import (
    MAE,
    MAEConfig,
    mask_by_noise,
    masked_mse,
    patchify,
    unpatchify,
)
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.vit import sincos_positions

Vits = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]


class TestPatchify:
    def test_puts_pixels_row_by_row_with_channels_last(self) -> None:
        images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
        patches = patchify(images, patch_size=2)
        assert patches.shape == (2, 2 * 3, 2 * 2 * 3)
        for n in range(2):
            for place in range(6):
                top, left = place // 3 * 2, place % 3 * 2
                expected = [
                    images[n, channel, top + row, left + column].item()
                    for row in range(2)
                    for column in range(2)
                    for channel in range(3)
                ]
                assert patches[n, place].tolist() == expected

    @pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (16, 8)])
    def test_unpatchify_undoes_it(self, height: int, width: int) -> None:
        images = torch.randn(2, 3, height, width).contiguous(memory_format=torch.channels_last)
        patches = patchify(images, patch_size=4)
        assert torch.equal(unpatchify(patches, patch_size=4, rows=height // 4), images)

    @pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 3, 9, 8), (2, 1, 8, 8), (3, 8, 8)])
    def test_says_which_shape_it_got(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match=r"multiples of patch_size=4; got \("):
            patchify(torch.zeros(shape), patch_size=4)


def mse_by_hand(prediction: Tensor, target: Tensor, mask: Tensor, normalize: bool) -> Tensor:
    """A loop over patches and values, in float64."""
    errors = []
    for n in range(len(target)):
        for place in range(target.shape[1]):
            if mask[n, place] == 0:
                continue
            wanted = target[n, place].double()
            if normalize:
                mean = wanted.sum() / len(wanted)
                variance = ((wanted - mean) ** 2).sum() / (len(wanted) - 1)
                wanted = (wanted - mean) / (variance + 1e-6) ** 0.5
            error = (prediction[n, place].double() - wanted) ** 2
            errors.append(error.sum() / len(wanted))
    return torch.stack(errors).sum() / len(errors)


def patches() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    spread = torch.linspace(0.2, 3.0, 5)[:, None]
    target = torch.randn(2, 5, 12) * spread + spread
    mask = torch.tensor([[1.0, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    return torch.randn(2, 5, 12).requires_grad_(), target, mask


class TestMaskedMse:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_equals_the_definition_written_as_loops_in_value_and_gradient(
        self, normalize: bool
    ) -> None:
        prediction, target, mask = patches()
        loss = masked_mse(prediction, target, mask, normalize=normalize)
        expected = mse_by_hand(prediction, target, mask, normalize)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, prediction)
        (exact,) = torch.autograd.grad(expected, prediction)
        torch.testing.assert_close(gradient, exact)
        assert (gradient[mask == 0] == 0).all()

    def test_is_zero_for_the_target_and_does_not_look_at_visible_patches(self) -> None:
        _, target, mask = patches()
        wrong_where_visible = torch.where(mask[:, :, None] == 1, target, 7.0)
        assert masked_mse(wrong_where_visible, target, mask, normalize=False).item() == 0

    def test_predicting_zero_for_normalised_patches_has_a_closed_form(self) -> None:
        _, target, mask = patches()
        loss = masked_mse(torch.zeros_like(target), target, mask, normalize=True)
        assert loss.item() == pytest.approx(11 / 12, rel=1e-4)

    def test_normalised_targets_do_not_depend_on_a_patchs_brightness_and_contrast(self) -> None:
        prediction, target, mask = patches()
        loss = masked_mse(prediction, target, mask, normalize=True).item()
        other = masked_mse(prediction, 5 * target + 3, mask, normalize=True).item()
        assert other == pytest.approx(loss, rel=1e-4)

    @pytest.mark.parametrize("normalize", [False, True])
    def test_gradient_is_right(self, normalize: bool) -> None:
        prediction, target, mask = patches()
        assert torch.autograd.gradcheck(
            lambda x: masked_mse(x, target.double(), mask.double(), normalize=normalize),
            (prediction.detach().double().requires_grad_(),),
        )

    def test_is_exact_under_autocast(self) -> None:
        prediction, target, mask = patches()
        loss = masked_mse(prediction, target, mask, normalize=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(masked_mse(prediction, target, mask, normalize=True), loss)
        half = masked_mse(prediction.bfloat16(), target, mask, normalize=True)
        assert half.dtype == loss.dtype == torch.float32

    def test_says_which_shapes_it_got(self) -> None:
        x = torch.zeros(2, 5, 12)
        with pytest.raises(ShapeError, match=r"got \(2, 5, 12\), \(2, 5, 12\), \(2, 4\)"):
            masked_mse(x, x, torch.zeros(2, 4), normalize=False)
        with pytest.raises(ShapeError, match=r"got \(2, 5, 12\), \(2, 5, 9\), \(2, 5\)"):
            masked_mse(x, torch.zeros(2, 5, 9), torch.zeros(2, 5), normalize=False)


class TestMaskByNoise:
    @pytest.mark.parametrize(
        ("length", "ratio", "visible"),
        [(64, 0.75, 16), (196, 0.75, 49), (100, 0.9, 10), (10, 0.75, 2), (3, 0.9, 1)],
    )
    def test_keeps_the_share_that_was_asked_for(
        self, length: int, ratio: float, visible: int
    ) -> None:
        masking = mask_by_noise(torch.rand(4, length), mask_ratio=ratio)
        assert masking.visible.shape == (4, visible)
        assert masking.mask.sum(dim=1).tolist() == [length - visible] * 4

    def test_keeps_the_least_noise_and_can_be_undone(self) -> None:
        torch.manual_seed(0)
        noise = torch.rand(3, 8)
        masking = mask_by_noise(noise, mask_ratio=0.5)
        for row in range(3):
            kept = set(masking.visible[row].tolist())
            assert max(noise[row, list(kept)]) < min(noise[row, [k not in kept for k in range(8)]])
            assert {k for k in range(8) if masking.mask[row, k] == 0} == kept
            back = masking.visible[row][masking.restore[row][list(kept)]]
            assert back.tolist() == list(kept)

    def test_every_place_is_removed_equally_often(self) -> None:
        torch.manual_seed(0)
        mask = mask_by_noise(torch.rand(4000, 8), mask_ratio=0.75).mask
        torch.testing.assert_close(mask.mean(dim=0), torch.full((8,), 0.75), atol=0.03, rtol=0)


SMALL: dict[str, Any] = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


def batch_of(images: Tensor) -> Batch:
    return Batch([images], torch.arange(len(images)))


@pytest.fixture
def images(make_views: Views) -> Tensor:
    return make_views(4, size=32)[0]


@pytest.fixture
def method(tiny_vit: Vits, training_set: TrainingSet) -> MAE:
    return MAE(MAEConfig(**SMALL), tiny_vit(), training_set)


def masking_of(images: Tensor) -> Any:
    torch.manual_seed(3)
    return mask_by_noise(torch.rand(len(images), 16), mask_ratio=0.75)


class TestMAE:
    def test_encoder_sees_the_visible_patches_only(self, method: MAE, images: Tensor) -> None:
        lengths: list[int] = []
        method.transformer.blocks[0].register_forward_pre_hook(
            lambda _, args: lengths.append(args[0].shape[1])
        )
        masking = masking_of(images)
        tokens, prediction = method.rebuild(images, masking)
        assert lengths == [1 + 4]
        cut = patchify(images, patch_size=8)
        other = torch.where(masking.mask[:, :, None] == 1, torch.randn_like(cut), cut)
        changed = unpatchify(other, patch_size=8, rows=4)
        again, same = method.rebuild(changed, masking)
        assert torch.equal(again, tokens)
        assert torch.equal(same, prediction)

    def test_a_visible_patch_reaches_every_prediction_of_its_image_and_no_other(
        self, method: MAE, images: Tensor
    ) -> None:
        masking = masking_of(images)
        cut = patchify(images, patch_size=8)
        cut[0, masking.visible[0, 0]] += torch.randn(192)
        moved = method.rebuild(unpatchify(cut, patch_size=8, rows=4), masking)[1]
        change = (moved - method.rebuild(images, masking)[1]).abs().amax(dim=2)
        assert (change[0] > 0).all()
        assert (change[1:] == 0).all()

    def test_decoder_puts_tokens_at_their_places(self, method: MAE, images: Tensor) -> None:
        """Without its blocks each prediction follows from the token and position of its place."""
        method.decoder.blocks = torch.nn.ModuleList()
        masking = masking_of(images)
        tokens, prediction = method.rebuild(images, masking)
        decoder = method.decoder
        position = sincos_positions(8, 4, 4)[0, 1:]
        for image in range(4):
            visible = masking.visible[image].tolist()
            for place in range(16):
                token = decoder.mask_token[0, 0]
                if place in visible:
                    token = decoder.embed(tokens[image, 1 + visible.index(place)])
                expected = decoder.predict(decoder.norm(token + position[place]))
                torch.testing.assert_close(prediction[image, place], expected)

    @pytest.mark.parametrize("normalize", [False, True])
    def test_loss_is_the_error_of_the_removed_patches_of_a_mask_drawn_now(
        self,
        tiny_vit: Vits,
        training_set: TrainingSet,
        images: Tensor,
        progress: Progress,
        normalize: bool,
    ) -> None:
        method = MAE(MAEConfig(**SMALL, normalize_targets=normalize), tiny_vit(), training_set)
        torch.manual_seed(3)
        loss = method(batch_of(images), progress).loss
        masking = masking_of(images)
        prediction = method.rebuild(images, masking)[1]
        target = patchify(images, patch_size=8)
        expected = mse_by_hand(prediction, target, masking.mask, normalize)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert method(batch_of(images), progress).loss != loss

    @pytest.mark.parametrize("pool", ["cls", "mean"])
    def test_features_are_the_backbones_pool_of_visible_tokens(
        self,
        tiny_vit: Vits,
        training_set: TrainingSet,
        images: Tensor,
        progress: Progress,
        pool: str,
    ) -> None:
        method = MAE(MAEConfig(**SMALL), tiny_vit(pool=pool), training_set)
        torch.manual_seed(3)
        features = method(batch_of(images), progress).features
        tokens = method.rebuild(images, masking_of(images))[0]
        expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
        torch.testing.assert_close(features, expected.detach())

    def test_metrics_are_0_for_a_prediction_that_is_the_same_everywhere(
        self, method: MAE, images: Tensor, progress: Progress
    ) -> None:
        torch.nn.init.zeros_(method.decoder.predict.weight)
        metrics = method(batch_of(images), progress).metrics
        assert metrics["mae/explained_variance"].item() == pytest.approx(0, abs=1e-4)
        assert metrics["mae/prediction_spread"].item() == pytest.approx(0, abs=1e-4)

    def test_metrics_are_1_for_the_right_one(self, method: MAE) -> None:
        _, target, mask = patches()
        mean, deviation = target.mean(2, keepdim=True), target.std(2, keepdim=True)
        metrics = method._health(torch.tensor(0.0), (target - mean) / deviation, target, mask)
        assert metrics["mae/explained_variance"].item() == 1
        assert metrics["mae/prediction_spread"].item() == pytest.approx(0.9, abs=0.1)

    def test_decoder_begins_as_the_authors(self, tiny_vit: Vits, training_set: TrainingSet) -> None:
        config = MAEConfig(decoder_dim=64, decoder_depth=1, decoder_heads=4)
        decoder = MAE(config, tiny_vit(), training_set).decoder
        weight = decoder.blocks[0].get_parameter("mlp.fc1.weight")
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * bound < weight.abs().max().item() <= bound
        assert decoder.blocks[0].get_parameter("mlp.fc1.bias").abs().max() == 0
        assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)

    @pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 32)])
    def test_takes_images_of_any_size_that_divides(
        self, method: MAE, progress: Progress, size: tuple[int, int]
    ) -> None:
        output = method(batch_of(torch.randn(1, 3, *size)), progress)
        assert output.loss.isfinite()

    def test_a_backbone_without_patches_is_refused(
        self, tiny_backbone: Callable[..., Backbone], training_set: TrainingSet
    ) -> None:
        with pytest.raises(ShapeError, match="needs a VisionTransformer; got Sequential"):
            MAE(MAEConfig(**SMALL), tiny_backbone(), training_set)


class TestConfig:
    def test_takes_one_view_and_a_vision_transformer(self) -> None:
        with pytest.raises(ConfigError, match="mae takes 1 views"):
            MAEConfig().check_shape(RunShape(8, 1, (32, 32), BackboneConfig()))
        with pytest.raises(ConfigError, match="mae needs a vision transformer"):
            MAEConfig().check_shape(RunShape(8, 1, (32,), BackboneConfig()))

    @pytest.mark.parametrize(("dim", "heads"), [(6, 2), (16, 3), (8, 16)])
    def test_decoder_width_must_fit(self, dim: int, heads: int) -> None:
        with pytest.raises(ValueError, match=f"decoder_dim={dim} must be a multiple of 4 and of"):
            MAEConfig(decoder_dim=dim, decoder_heads=heads)

    def test_round_trip(self) -> None:
        config: Config = MAEConfig(mask_ratio=0.6)
        assert MAEConfig(**config.model_dump()) == config


class TestPictures:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_are_the_image_what_it_sees_and_what_it_makes(
        self,
        tiny_vit: Vits,
        training_set: TrainingSet,
        images: Tensor,
        progress: Progress,
        normalize: bool,
    ) -> None:
        config = MAEConfig(**SMALL, normalize_targets=normalize)
        method = MAE(config, tiny_vit(), training_set).eval()
        state = torch.get_rng_state()
        grid = method.pictures(batch_of(images), progress)["reconstruction"]
        assert torch.equal(torch.get_rng_state(), state)
        assert grid.images.shape == (4, 4, 3, 32, 32)
        assert grid.columns == ("image", "visible", "prediction", "combined")
        assert torch.equal(grid.images[:, 0], images)

        original, sees, makes, pasted = (
            patchify(grid.images[:, column], patch_size=8) for column in range(4)
        )
        visible = (sees != 0).all(dim=2)
        assert visible.sum(dim=1).tolist() == [4] * 4
        assert torch.equal(pasted[visible], original[visible])
        assert torch.equal(pasted[~visible], makes[~visible])
        if normalize:  # a patch that was predicted as flat has its own mean
            torch.nn.init.zeros_(method.decoder.predict.weight)
            again = method.pictures(batch_of(images), progress)["reconstruction"].images[:, 2]
            flat = patchify(again, patch_size=8)
            torch.testing.assert_close(flat, original.mean(2, keepdim=True).expand_as(flat))
