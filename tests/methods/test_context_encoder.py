import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.context_encoder import (
    ContextEncoder,
    ContextEncoderConfig,
    adversarial_loss,
    block_mask,
    central_mask,
    discriminator_loss,
    reconstruction_loss,
    region_mask,
)
from raysl.nn.backbones import Backbone, BackboneConfig

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"bottleneck_dim": 5, "decoder_width": 2, "discriminator_width": 2}


def batch_of(image: Tensor) -> Batch:
    return Batch([image], torch.arange(len(image)))


class TestMasks:
    @pytest.mark.parametrize("size", [16, 32, 128])
    def test_the_centre_is_a_square_of_half_the_side(self, size: int) -> None:
        mask = central_mask(2, size, share=0.25, device=CPU)
        expected = torch.zeros(size, size, dtype=torch.bool)
        expected[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = True
        assert mask.shape == (2, 1, size, size)
        assert (mask == expected).all()

    def test_blocks_cover_at_most_their_share_and_one_alone_all_of_it(self) -> None:
        torch.manual_seed(0)
        share = block_mask(200, 64, share=0.25, num_blocks=4, device=CPU).float().mean((1, 2, 3))
        assert share.max() <= 0.25
        assert share.min() < share.max()  # some overlap
        assert share.mean() > 0.18
        alone = block_mask(50, 64, share=0.25, num_blocks=1, device=CPU).float().mean((1, 2, 3))
        assert (alone == 0.25).all()

    def test_blocks_reach_every_border(self) -> None:
        torch.manual_seed(0)
        anywhere = block_mask(500, 16, share=0.25, num_blocks=4, device=CPU).any(dim=0)
        assert anywhere.all()

    @pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
    def test_regions_cover_their_share_of_each_image_to_the_pixel(self, share: float) -> None:
        mask = region_mask(20, 32, share=share, device=CPU)
        covered = mask.sum(dim=(1, 2, 3))
        assert (covered - round(share * 32 * 32)).abs().max() <= 1

    def test_regions_are_shapes_and_differ_between_images(self) -> None:
        torch.manual_seed(0)
        mask = region_mask(20, 64, share=0.25, device=CPU)
        # Neighbours agree far more often than the 1 - 2 * 0.25 * 0.75 of loose pixels.
        assert (mask[..., 1:] == mask[..., :-1]).float().mean() > 0.9
        assert len({tuple(m.flatten().tolist()) for m in mask}) == 20


class TestReconstructionLoss:
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(self) -> None:
        torch.manual_seed(0)
        prediction = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        target = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        weight = torch.randint(0, 3, (2, 1, 4, 4)).double()
        by_hand = torch.zeros((), dtype=torch.float64)
        for n in range(2):
            asked = sum(3 for w in weight[n].flatten().tolist() if w > 0)
            for c, i, j in itertools.product(range(3), range(4), range(4)):
                error = prediction[n, c, i, j] - target[n, c, i, j]
                by_hand = by_hand + weight[n, 0, i, j] * error**2 / asked / 2
        loss = reconstruction_loss(prediction, target, weight)
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(
            torch.autograd.grad(loss, prediction), torch.autograd.grad(by_hand, prediction)
        )
        assert torch.autograd.gradcheck(
            lambda x: reconstruction_loss(x, target, weight), prediction
        )

    def test_is_the_mean_squared_error_where_all_weights_are_1(self) -> None:
        x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
        loss = reconstruction_loss(x, y, torch.ones(2, 1, 8, 8))
        torch.testing.assert_close(loss, nn.functional.mse_loss(x, y))

    def test_does_not_see_what_is_not_asked_for(self) -> None:
        x, y = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
        weight = torch.zeros(1, 1, 8, 8)
        weight[..., :4] = 1
        other = x.clone()
        other[..., 4:] += 100
        assert torch.equal(reconstruction_loss(x, y, weight), reconstruction_loss(other, y, weight))

    def test_is_float32_under_autocast(self) -> None:
        x, y = torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(1, 3, 8, 8)
        weight = torch.ones(1, 1, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = reconstruction_loss(x, y, weight)
        assert torch.equal(loss, reconstruction_loss(x.float(), y, weight))

    def test_says_which_shapes_it_got(self) -> None:
        x = torch.zeros(2, 3, 4, 4)
        with pytest.raises(ShapeError, match=r"got .* \(2, 3, 4, 4\)$"):
            reconstruction_loss(x, x, x)


class TestAdversarialLosses:
    def test_chance_costs_twice_log_2_and_log_2(self) -> None:
        zero = torch.zeros(5)
        assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
        assert adversarial_loss(zero).item() == pytest.approx(math.log(2))

    def test_equal_the_logarithms_of_probabilities(self) -> None:
        real = torch.randn(6, dtype=torch.float64, requires_grad=True)
        made = torch.randn(6, dtype=torch.float64, requires_grad=True)
        p, q = torch.sigmoid(real), torch.sigmoid(made)
        expected = -(torch.log(p).mean() + torch.log(1 - q).mean())
        torch.testing.assert_close(discriminator_loss(real, made), expected)
        torch.testing.assert_close(adversarial_loss(made), -torch.log(q).mean())
        assert torch.autograd.gradcheck(discriminator_loss, (real, made))
        assert torch.autograd.gradcheck(adversarial_loss, made)

    def test_are_float32_and_finite_for_a_sure_discriminator(self) -> None:
        sure = torch.full((3,), 200.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lost = adversarial_loss(-sure.bfloat16())
            assert discriminator_loss(sure, -sure) == 0
        assert lost.dtype == torch.float32
        assert lost == 200


@pytest.mark.parametrize("mask", ["centre", "blocks", "region"])
class TestEveryMask:
    def build(self, mask: Any, backbone: Backbone, data: TrainingSet) -> ContextEncoder:
        torch.manual_seed(1)
        return ContextEncoder(ContextEncoderConfig(mask=mask, **SMALL), backbone, data)

    def test_neither_loss_has_a_gradient_in_the_others_parameters(
        self,
        mask: str,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = self.build(mask, tiny_backbone(), training_set)
        output = method(batch_of(make_views(num_views=1, size=32)[0]), progress)
        assert method.adversary is not None
        assert output.adversary_loss is not None
        judge = list(method.adversary.parameters())
        painter = [p for p in method.parameters() if all(p is not q for q in judge)]

        def gradients(loss: Tensor, of: list[nn.Parameter]) -> list[Tensor | None]:
            found = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
            return list(found)

        assert all(g is None for g in gradients(output.loss, judge))
        assert all(g is None for g in gradients(output.adversary_loss, painter))
        for loss, of in ((output.loss, painter), (output.adversary_loss, judge)):
            assert all(g is not None and g.abs().sum() > 0 for g in gradients(loss, of))

    def test_the_painter_has_the_adversarial_gradient_of_the_discriminator_itself(
        self,
        mask: Any,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        data, image = training_set, make_views(num_views=1, size=32)[0]
        config = ContextEncoderConfig(
            mask=mask, reconstruction_weight=0.0, adversarial_weight=1.0, **SMALL
        )
        method = ContextEncoder(config, tiny_backbone(), data)
        torch.manual_seed(2)
        output = method(batch_of(image), progress)
        torch.manual_seed(2)
        hole = method._hole(image)
        _, painted = method._paint(image, hole)
        assert method.discriminator is not None
        logits = method.discriminator(painted * (hole.weight > 0))
        torch.testing.assert_close(output.loss, adversarial_loss(logits))
        weight = method.bottleneck.get_parameter("0.weight")
        torch.testing.assert_close(
            torch.autograd.grad(output.loss, weight),
            torch.autograd.grad(adversarial_loss(logits), weight),
        )

    def test_only_the_discriminators_own_passes_move_its_running_statistics(
        self,
        mask: str,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = self.build(mask, tiny_backbone(), training_set)
        method(batch_of(make_views(num_views=1, size=32)[0]), progress)
        assert method.discriminator is not None
        counts = [
            b for n, b in method.discriminator.named_buffers() if n.endswith("batches_tracked")
        ]
        assert counts
        assert all(count == 2 for count in counts)  # real and painted

    @pytest.mark.parametrize("size", [16, 32, 41])
    def test_views_may_have_another_size_than_was_planned(
        self,
        mask: str,
        size: int,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = self.build(mask, tiny_backbone(), training_set)
        batch = batch_of(make_views(4, num_views=1, size=size)[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = method(batch, progress)
        assert torch.isfinite(output.loss)
        assert output.loss.dtype == torch.float32

    def test_pictures_change_only_what_is_in_the_hole(
        self,
        mask: str,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = self.build(mask, tiny_backbone(), training_set).eval()
        image = make_views(3, num_views=1, size=32)[0]
        grid = method.pictures(batch_of(image), progress)["inpainting"]
        assert grid.images.shape == (3, 3, 3, 32, 32)
        view, seen, painted = grid.images.unbind(1)
        assert torch.equal(view, image)
        hole = (seen == 0).all(dim=1, keepdim=True)
        share = (14 / 32) ** 2 if mask == "centre" else 0.25
        assert hole.float().mean().item() == pytest.approx(share, abs=0.05)
        assert torch.equal(torch.where(hole, view, painted), view)
        assert (painted != view)[hole.expand_as(view)].float().mean() > 0.99


class TestContextEncoder:
    def test_the_centre_is_predicted_with_a_ring_that_weighs_ten_times(
        self, tiny_backbone: Backbones, make_views: Views, training_set: TrainingSet
    ) -> None:
        data = training_set._replace(view_sizes_px=(128,))
        method = ContextEncoder(ContextEncoderConfig(**SMALL), tiny_backbone(), data)
        hole = method._hole(make_views(1, num_views=1, size=128)[0])
        assert (hole.start, hole.size) == (32, 64)
        assert hole.masked.sum() == 56**2
        assert hole.masked[0, 0, 36:92, 36:92].all()
        assert (hole.weight == 1).sum() == 56**2
        assert (hole.weight == 10).sum() == 64**2 - 56**2
        assert (hole.weight[0, 0, 4:60, 4:60] == 1).all()

    def test_the_network_does_not_see_the_hole(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        config = ContextEncoderConfig(**SMALL)
        method = ContextEncoder(config, tiny_backbone(batch_norm=False), training_set)
        image = make_views(num_views=1, size=32)[0]
        other = image.clone()
        other[:, :, 9:23, 9:23] += 3.0
        first, second = (method(batch_of(x), progress) for x in (image, other))
        assert torch.equal(first.features, second.features)
        assert first.loss != second.loss
        image[:, :, 9:23, 9:23] = 0
        torch.testing.assert_close(first.features, method.encoder(image).detach())

    def test_painting_the_mean_colour_has_relative_error_1(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = ContextEncoder(ContextEncoderConfig(**SMALL), tiny_backbone(), training_set)
        nn.init.zeros_(list(method.decoder.parameters())[-1])
        output = method(batch_of(make_views(num_views=1, size=32)[0]), progress)
        assert output.metrics["context_encoder/relative_error"].item() == pytest.approx(1.0)

    def test_without_the_adversarial_loss_there_is_no_adversary(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        config = ContextEncoderConfig(adversarial_weight=0.0, **SMALL)
        method = ContextEncoder(config, tiny_backbone(), training_set)
        output = method(batch_of(make_views(num_views=1, size=32)[0]), progress)
        assert method.adversary is None
        assert output.adversary_loss is None
        rebuilt = output.metrics["context_encoder/reconstruction_loss"]
        torch.testing.assert_close(output.loss.detach(), 0.999 * rebuilt)


class TestCheck:
    @pytest.mark.parametrize(
        ("settings", "view", "message"),
        [
            ({}, 8, "data.views.size_px=8: method context_encoder needs views of 16 px"),
            ({"overlap": 0.2, "masked_share": 0.1}, 32, "leaves nothing of a hole of 10 px"),
            ({"reconstruction_weight": 0.0, "adversarial_weight": 0.0}, 32, "are both 0"),
        ],
    )
    def test_refuses(self, settings: dict[str, Any], view: int, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ContextEncoderConfig(**settings).check_shape(RunShape(8, 1, (view,), BackboneConfig()))

    def test_the_published_settings_pass(self) -> None:
        ContextEncoderConfig().check_shape(RunShape(64, 1, (128,), BackboneConfig()))
