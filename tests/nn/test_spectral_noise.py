import copy

import pytest
import torch
from torch import Tensor

from raysl.nn.spectral_noise import SpectralGaussian

EXACT = torch.float64


def images(n: int = 400, size: int = 4, seed: int = 0) -> Tensor:
    """Smooth images with colours that go together, about a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=EXACT)
    x = x + 0.7 * x.roll(1, dims=3) + 0.4 * x.roll((1, 1), dims=(2, 3))
    mix = torch.tensor([[1.0, 0.5, 0.2], [0.3, 1.0, 0.4], [0.1, 0.2, 0.6]], dtype=EXACT)
    ramp = torch.linspace(-1, 1, size, dtype=EXACT)
    return torch.einsum("cd,ndhw->nchw", mix, x) + ramp


def fitted(size: int = 4) -> SpectralGaussian:
    model = SpectralGaussian(size).double()
    model.fit_(images(size=size))
    return model


def pixel_covariance(model: SpectralGaussian) -> Tensor:
    """The covariance of all pixels, from the map of white to coloured noise."""
    n = model.mean.numel()
    eye = torch.eye(n, dtype=EXACT).view(n, *model.mean.shape)
    rows = torch.einsum("hwcd,ndhw->nchw", model._factor(), torch.fft.rfft2(eye, norm="ortho"))
    size = [model.size_px] * 2
    mixed = torch.fft.irfft2(rows, s=size, norm="ortho").flatten(1)
    return mixed.T @ mixed


@pytest.mark.parametrize("size", [3, 4, 5])
class TestDensity:
    def test_is_that_of_the_full_multivariate_normal(self, size: int) -> None:
        model = fitted(size)
        full = torch.distributions.MultivariateNormal(model.mean.flatten(), pixel_covariance(model))
        x = 2 * images(7, size, seed=1)
        torch.testing.assert_close(
            model.log_prob(x), full.log_prob(x.flatten(1)), rtol=1e-9, atol=1e-9
        )

    def test_depends_on_the_distance_of_pixels_alone(self, size: int) -> None:
        covariance = pixel_covariance(fitted(size)).view(3, size, size, 3, size, size)
        moved = covariance.roll((1, 2, 1, 2), dims=(1, 2, 4, 5))
        torch.testing.assert_close(covariance, moved, rtol=1e-9, atol=1e-9)

    def test_covariance_is_that_of_the_images_averaged_over_places(self, size: int) -> None:
        x = images(size=size)
        model = fitted(size)
        rows = torch.cat([x, torch.zeros(1, 3, size, size, dtype=EXACT)]).flatten(1)
        rows = rows - rows.mean(dim=0)
        sample = rows.T @ rows
        sample = (sample + torch.eye(sample.shape[0], dtype=EXACT)) / len(rows)  # the made-up image
        sample = sample.view(3, size, size, 3, size, size)
        moves = [(i, j) for i in range(size) for j in range(size)]
        average = sum(sample.roll((i, j, i, j), dims=(1, 2, 4, 5)) for i, j in moves) / len(moves)
        found = pixel_covariance(model).view(3, size, size, 3, size, size)
        torch.testing.assert_close(found, average, rtol=1e-8, atol=1e-9)


class TestFit:
    def test_in_parts_equals_that_of_the_whole(self) -> None:
        x = images(48)
        whole, parts = (SpectralGaussian(4).double() for _ in range(2))
        whole.fit_(x)
        for part in x.split([7, 1, 40]):
            parts.fit_(part)
        for name, value in whole.named_buffers():
            torch.testing.assert_close(dict(parts.named_buffers())[name], value, msg=name)
        assert parts.count.item() == 49

    def test_of_one_image_leaves_a_density(self) -> None:
        model = SpectralGaussian(4)
        model.fit_(images(1).float())
        assert model.log_prob(images(3).float()).isfinite().all()

    def test_begins_as_white_noise(self) -> None:
        x = images(5)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(dim=(1, 2, 3))
        torch.testing.assert_close(SpectralGaussian(4).double().log_prob(x), expected)


class TestSample:
    def test_has_the_mean_and_the_covariance(self) -> None:
        model = fitted()
        torch.manual_seed(0)
        x = model.sample(20_000)
        covariance = pixel_covariance(model)
        scale = float(covariance.diagonal().max())
        torch.testing.assert_close(x.mean(dim=0), model.mean, rtol=0, atol=0.03 * scale**0.5)
        torch.testing.assert_close(x.flatten(1).T.cov(), covariance, rtol=0, atol=0.05 * scale)

    def test_an_odd_side_is_kept(self) -> None:
        assert SpectralGaussian(5).sample(2).shape == (2, 3, 5, 5)


def test_float32_agrees_with_float64_at_the_size_of_photographs() -> None:
    torch.manual_seed(0)
    x = images(64, 32)
    single, double = SpectralGaussian(32), SpectralGaussian(32).double()
    single.fit_(x.float())
    double.fit_(x)
    found = single.log_prob(x.float()).double()
    torch.testing.assert_close(found, double.log_prob(x), rtol=1e-5, atol=0.05)


def test_state_moves_to_channels_last_and_through_a_state_dict() -> None:
    model = fitted()
    other = SpectralGaussian(4).double().to(memory_format=torch.channels_last)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    x = images(3)
    assert torch.equal(other.log_prob(x), model.log_prob(x))
