import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raysl.errors import ConfigError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.ebm import EBM, EBMConfig
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.contrastive_divergence import contrastive_divergence_loss
from raysl.nn.perturbation import perturb

TRAININGS = ("mcmc", "score_matching", "nce", "conditional_nce")
every_training = pytest.mark.parametrize("training", TRAININGS)

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]


def build(backbone: Backbone, **settings: Any) -> EBM:
    fields = {"hidden_dim": 8, "buffer_length": 24, "langevin_steps": 3} | settings
    torch.manual_seed(0)
    return EBM(EBMConfig(**fields), backbone, TrainingSet(64, 8, (8,)))


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


@every_training
class TestEveryTraining:
    @pytest.mark.parametrize("batch_norm", [False, True])
    def test_every_parameter_gets_a_gradient(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training: str,
        batch_norm: bool,
    ) -> None:
        method = build(tiny_backbone(batch_norm=batch_norm), training=training)
        output = method(batch_of(make_views(num_views=1)), progress)
        assert not any(p.grad is not None for p in method.parameters())  # before backward
        output.loss.backward()
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

    def test_vision_transformer_will_do(
        self, tiny_vit: Backbones, make_views: Views, progress: Progress, training: str
    ) -> None:
        method = EBM(
            EBMConfig(training=training, buffer_length=8, langevin_steps=2),
            tiny_vit(),
            TrainingSet(64, 8, (32,)),
        )
        method(batch_of(make_views(num_views=1, size=32)), progress).loss.backward()
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_averages_of_batch_norm_are_those_of_the_data(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, training: str
    ) -> None:
        method = build(tiny_backbone(), training=training)
        plain = copy.deepcopy(method.backbone)
        views = make_views(num_views=1)
        method(batch_of(views), progress)
        plain(views[0])
        for found, expected in zip(method.backbone.buffers(), plain.buffers(), strict=True):
            assert torch.equal(found, expected)
        assert method.backbone.training

    def test_loss_is_the_same_under_no_grad(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, training: str
    ) -> None:
        method = build(tiny_backbone(batch_norm=False), training=training)
        batch = batch_of(make_views(num_views=1))
        torch.manual_seed(1)
        expected = method(batch, progress).loss.detach()
        torch.manual_seed(1)
        with torch.no_grad():
            assert torch.equal(method(batch, progress).loss, expected)

    def test_is_close_under_autocast_and_its_loss_is_float32(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, training: str
    ) -> None:
        method = build(tiny_backbone(), training=training)
        batch = batch_of(make_views(num_views=1))
        losses = []
        for enabled in (False, True):
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                losses.append(method(batch, progress).loss)
        losses[1].backward()
        assert losses[1].dtype == torch.float32
        assert losses[1].item() == pytest.approx(losses[0].item(), abs=0.02)
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name

    def test_a_resumed_run_goes_on_as_it_would_have(
        self, tiny_backbone: Backbones, make_views: Views, training: str
    ) -> None:
        def go_on(method: EBM, steps: range) -> list[Tensor]:
            losses = []
            optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
            for step in steps:
                torch.manual_seed(step)
                now = Progress(step, 10, 5, seed=1)
                output = method(batch_of(make_views(num_views=1, seed=step)), now)
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
                method.after_optimizer_step(now)
                losses.append(output.loss.detach())
            return losses

        whole = build(tiny_backbone(), training=training, restart_prob=0.3)
        expected = go_on(whole, range(4))
        first = build(tiny_backbone(), training=training, restart_prob=0.3)
        go_on(first, range(2))
        second = build(tiny_backbone(seed=3), training=training, restart_prob=0.3)
        second.load_state_dict(first.state_dict())
        assert [x.item() for x in go_on(second, range(2, 4))] == [x.item() for x in expected[2:]]
        for name, value in whole.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name

    def test_its_picture_says_what_it_shows(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, training: str
    ) -> None:
        method = build(tiny_backbone(), training=training).eval()
        batch = batch_of(make_views(num_views=1))
        with torch.inference_mode():
            pictures = method.pictures(batch, progress)
        (name, picture), *more = pictures.items()
        assert more == []
        names = {"mcmc": "samples", "score_matching": "denoised"}
        assert name == names.get(training, "data_and_noise")
        assert len(picture.columns) in (0, picture.images.shape[1])
        assert picture.images.isfinite().all()
        assert "energies" in picture.caption or "error" in picture.caption

    def test_features_are_the_encoders(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, training: str
    ) -> None:
        method = build(
            tiny_backbone(batch_norm=False),
            training=training,
            input_noise_std=0.0,
            noise_std_range=(1e-6, 1e-6),
        )
        views = make_views(num_views=1)
        output = method(batch_of(views), progress)
        torch.testing.assert_close(
            output.features, method.encoder(views[0]).detach(), rtol=1e-3, atol=1e-4
        )


class TestMCMC:
    def test_loss_is_the_contrast_with_samples_that_go_into_the_buffer(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(tiny_backbone(), input_noise_std=0.0, energy_regularisation=0.1)
        views = make_views(num_views=1)
        assert method.buffer is not None
        before = method.buffer.samples.clone()
        output = method(batch_of(views), progress)
        assert torch.equal(method.buffer.samples, before)  # only after the step
        method.eval()
        data = method.energy(views[0])
        method.after_optimizer_step(progress)
        changed = (method.buffer.samples != before).flatten(1).any(dim=1)
        assert int(changed.sum()) == 8
        assert torch.equal(method.buffer.num_steps > 0, changed)
        samples = method.energy(method.buffer.samples[changed].float())  # rounded to halves
        expected = contrastive_divergence_loss(data, samples, regularisation=0.1)
        assert output.loss.item() == pytest.approx(expected.item(), abs=1e-3)

    def test_settings_are_for_values_from_minus_1_to_1(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        """The same dynamics on images that are stretched by 3, of a network that undoes it."""
        losses = []
        for stretch in (1.0, 3.0):
            backbone = tiny_backbone(batch_norm=False)
            with torch.no_grad():
                backbone.net[0].weight.div_(stretch)
            method = build(backbone, value_range=(-stretch, stretch))
            views = [view * stretch for view in make_views(num_views=1)]
            torch.manual_seed(1)
            losses.append(method(batch_of(views), progress).loss.item())
        assert losses[1] == pytest.approx(losses[0], abs=2e-4)

    @pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (-2.0, 2.5)])
    def test_igebms_settings_take_igebms_steps(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        value_range: tuple[float, float],
    ) -> None:
        """A step of 10 along gradients clipped at 0.01, for pixels from 0 to 1, is one of 40 here.

        The authors' train.py: line 774 with --step_lr=10 --proj_norm=0.01, clamped to [0, 1].
        """
        low, high = value_range
        settings = {"langevin_step_size": 40.0, "langevin_max_gradient": 0.005}
        method = build(
            tiny_backbone(batch_norm=False),
            value_range=value_range,
            langevin_steps=1,
            langevin_noise_std=0.0,
            input_noise_std=0.0,
            restart_prob=1.0,
            restart_from="data",
            **settings,
        )
        with torch.no_grad():
            method.head[0].weight.mul_(20)  # so that some gradients are clipped and others not
        (view,) = make_views(num_views=1)
        pixels = view.sigmoid()
        images = low + (high - low) * pixels
        method(batch_of([images]), progress)
        assert method._finished_chains is not None
        moved = (method._finished_chains[1] - low) / (high - low)
        place = pixels.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            method.eval().energy(low + (high - low) * place).sum(), place
        )
        expected = (pixels - 10 * gradient.clamp(-0.01, 0.01)).clamp(0, 1)
        assert 0.05 < (gradient.abs() > 0.01).float().mean() < 0.95
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5)

    def test_chains_can_start_at_the_data(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(
            tiny_backbone(),
            restart_from="data",
            restart_prob=1.0,
            input_noise_std=0.0,
            langevin_noise_std=0.0,
            langevin_step_size=1e-9,
            value_range=(-20.0, 20.0),
        )
        views = make_views(num_views=1)
        method(batch_of(views), progress)
        method.after_optimizer_step(progress)
        assert method.buffer is not None
        slots = method.buffer.num_steps.nonzero()[:, 0]
        for image in method.buffer.samples[slots].float():
            assert (views[0] - image).abs().flatten(1).amax(dim=1).min() < 0.01

    def test_chains_can_start_at_turned_data(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(
            tiny_backbone(),
            restart_from="perturbed_data",
            perturbations=("turn",),
            restart_prob=1.0,
            input_noise_std=0.0,
            langevin_noise_std=0.0,
            langevin_step_size=1e-9,
            value_range=(-20.0, 20.0),
        )
        views = make_views(num_views=1)
        method(batch_of(views), progress)
        method.after_optimizer_step(progress)
        assert method.buffer is not None
        slots = method.buffer.num_steps.nonzero()[:, 0]
        turned = torch.cat([views[0].rot90(k, (2, 3)) for k in (1, 2, 3)])
        for image in method.buffer.samples[slots].float():
            assert (turned - image).abs().flatten(1).amax(dim=1).min() < 0.01

    def test_a_buffer_shorter_than_the_batch_is_refused(self) -> None:
        shape = RunShape(512, 1, (32,), BackboneConfig())
        with pytest.raises(ConfigError, match=r"buffer_length=100 .*global_batch_size=512"):
            EBMConfig(buffer_length=100).check(shape)
        EBMConfig(buffer_length=512).check(shape)
        EBMConfig(training="nce", buffer_length=100).check(shape)


class TestScoreMatching:
    def test_learns_the_score_of_one_gaussian_pixel_value(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        """Steps on the loss take noise away: half of it is left of constant images."""
        method = build(
            tiny_backbone(batch_norm=False), training="score_matching", noise_std_range=(0.3, 0.3)
        )
        optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
        losses = []
        for step in range(60):
            torch.manual_seed(step)
            level = torch.randn(16, 1, 1, 1) * 0.1
            output = method(batch_of([level.expand(16, 3, 8, 8)]), progress)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.item())
        assert losses[0] == pytest.approx(0.5, abs=0.1)
        assert sum(losses[-5:]) / 5 < 0.4


class TestNCE:
    def test_loss_is_that_of_a_density_relative_to_the_noise(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(tiny_backbone(), training="nce", num_noise=2)
        assert method.noise is not None
        views = make_views(num_views=1)
        torch.manual_seed(1)
        output = method(batch_of(views), progress)
        method.eval()
        torch.manual_seed(1)
        noise = method.noise.sample(16)
        with torch.no_grad():
            data, other = -method.energy(views[0]), -method.energy(noise).view(8, 2)
        by_hand = 0.0
        for n in range(8):
            by_hand -= math.log(1 / (1 + 2 * math.exp(-data[n])))
            by_hand -= sum(math.log(2 / (2 + math.exp(other[n, k]))) for k in range(2))
        assert output.loss.item() == pytest.approx(by_hand / 8, rel=1e-5)

    def test_noise_is_fitted_to_the_images_of_each_step(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(tiny_backbone(), training="nce")
        assert method.noise is not None
        seen = []
        for seed in range(3):
            views = make_views(num_views=1, seed=seed)
            method(batch_of(views), progress)
            method.after_optimizer_step(progress)
            seen.append(views[0])
        assert method.noise.count.item() == 25
        torch.testing.assert_close(method.noise.mean, torch.cat(seen).sum(dim=0) / 25)


class TestConditionalNCE:
    def test_loss_is_the_contrast_with_what_was_made_of_each_image(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(
            tiny_backbone(),
            training="conditional_nce",
            num_noise=2,
            perturbations=("turn", "gaussian"),
            noise_std_range=(0.1, 0.2),
            value_range=(-2.0, 2.0),
        )
        views = make_views(num_views=1)
        torch.manual_seed(1)
        output = method(batch_of(views), progress)
        method.eval()
        torch.manual_seed(1)
        twice = views[0].repeat_interleave(2, dim=0)
        noise, kinds = perturb(twice, ("turn", "gaussian"), (0.2, 0.4))
        with torch.no_grad():
            data, other = method.energy(views[0]), method.energy(noise)
        by_hand = [
            math.log(1 + math.exp(data[n] - other[2 * n + k])) for n in range(8) for k in range(2)
        ]
        assert output.loss.item() == pytest.approx(2 * sum(by_hand) / 16, rel=1e-5)
        right = [float(other[i] > data[i // 2]) for i in range(16) if kinds[i] == 0]
        share = output.metrics["ebm/right_turn"].item()
        assert share == pytest.approx(sum(right) / len(right))

    def test_learns_which_way_up_images_are(
        self, tiny_backbone: Backbones, progress: Progress
    ) -> None:
        method = build(tiny_backbone(), training="conditional_nce", perturbations=("turn",))
        optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
        bright_above = torch.linspace(1, -1, 8).view(1, 1, 8, 1).expand(16, 3, 8, 8)
        losses = []
        for step in range(40):
            torch.manual_seed(step)
            images = bright_above + 0.3 * torch.randn(16, 3, 8, 8)
            loss = method(batch_of([images]), progress).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(2 * math.log(2), abs=0.3)
        assert sum(losses[-5:]) / 5 < 0.3


@pytest.mark.parametrize(
    "ranges", [{"value_range": (1.0, 1.0)}, {"noise_std_range": (0.5, 0.1)}], ids=str
)
def test_ranges_go_from_low_to_high(ranges: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="go from low to high"):
        EBMConfig(**ranges)


def test_settings_survive_a_dump() -> None:
    config = EBMConfig(training="nce", num_noise=3, value_range=(-2.0, 2.1))
    assert EBMConfig(**config.model_dump()) == config
