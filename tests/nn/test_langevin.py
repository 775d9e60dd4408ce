import math

import pytest
import torch
from torch import Tensor, nn

from raysl.nn.langevin import ChainStarts, ReplayBuffer, energy_gradient, langevin


def quadratic(x: Tensor) -> Tensor:
    """The energy of a Gaussian of mean 1 and variance 1/4."""
    return 2 * (x - 1).square().flatten(1).sum(dim=1)


class TestLangevin:
    def test_samples_the_gaussian_of_a_quadratic_energy(self) -> None:
        torch.manual_seed(0)
        step = 0.01
        x, _ = langevin(
            quadratic, torch.full((500, 3, 4, 4), 3.0), num_steps=300, step_size=step,
            noise_std=math.sqrt(2 * step),
        )  # fmt: skip
        # A step keeps 1 - 4 a of the distance: the variance solves v = (1 - 4 a)^2 v + 2 a.
        variance = 2 * step / (1 - (1 - 4 * step) ** 2)
        assert x.mean().item() == pytest.approx(1.0, abs=0.01)
        assert x.var().item() == pytest.approx(variance, rel=0.02)
        assert variance == pytest.approx(1 / 4, rel=0.03)

    def test_without_noise_it_is_gradient_descent(self) -> None:
        start = torch.randn(2, 3, 4, 4)
        x, lengths = langevin(quadratic, start, num_steps=2, step_size=0.1, noise_std=0.0)
        torch.testing.assert_close(x, 1 + (start - 1) * 0.6**2)
        torch.testing.assert_close(lengths, (4 * 0.6 * (start - 1)).flatten(1).norm(dim=1))

    def test_clips_the_gradient_of_each_value_and_tells_its_length_before(self) -> None:
        start = torch.tensor([3.0, 1.01, -1.0]).repeat(1, 16).view(1, 3, 4, 4)
        x, lengths = langevin(
            quadratic, start, num_steps=1, step_size=10.0, noise_std=0.0, max_gradient=0.5
        )
        gradient = 4 * (start - 1)
        torch.testing.assert_close(x, start - 10 * gradient.clamp(-0.5, 0.5))
        torch.testing.assert_close(lengths, gradient.flatten(1).norm(dim=1))

    def test_stays_within_the_range_of_values(self) -> None:
        x, _ = langevin(
            quadratic, torch.zeros(4, 3, 4, 4), num_steps=5, step_size=0.1, noise_std=1.0,
            value_range=(-0.5, 0.5),
        )  # fmt: skip
        assert x.min() == -0.5
        assert x.max() == 0.5

    def test_touches_no_parameter_and_not_its_start(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.SiLU(), nn.Linear(5, 1))
        start = torch.randn(2, 3, 4, 4)
        before = start.clone()
        with torch.no_grad():
            x, _ = langevin(
                lambda y: net(y)[:, 0], start, num_steps=3, step_size=1.0, noise_std=0.1
            )
        assert torch.equal(start, before)
        assert not x.requires_grad
        assert all(parameter.grad is None for parameter in net.parameters())

    def test_no_step_returns_the_start(self) -> None:
        start = torch.randn(2, 3, 4, 4)
        x, lengths = langevin(quadratic, start, num_steps=0, step_size=1.0, noise_std=1.0)
        assert torch.equal(x, start)
        assert lengths.tolist() == [0, 0]


def test_energy_gradient_can_be_differentiated() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    x = torch.randn(2, 3, 4, 4)
    slope = energy_gradient(lambda y: weight * quadratic(y), x, create_graph=True)
    torch.testing.assert_close(slope, 3 * 4 * (x - 1))
    (second,) = torch.autograd.grad(slope.sum(), weight)
    torch.testing.assert_close(second, (4 * (x - 1)).sum())


def draw(
    buffer: ReplayBuffer, *, count: int = 6, restart: float = 0.0, seed: int = 0
) -> ChainStarts:
    generator = torch.Generator().manual_seed(seed)
    return buffer.starts(count, restart_prob=restart, generator=generator)


class TestReplayBuffer:
    def build(self) -> ReplayBuffer:
        torch.manual_seed(0)
        return ReplayBuffer(20, 4, (-2.0, 1.0))

    def test_begins_as_uniform_noise(self) -> None:
        samples = ReplayBuffer(500, 8, (-2.0, 1.0)).samples.float()
        assert samples.min() >= -2.0
        assert samples.max() <= 1.0
        assert samples.mean().item() == pytest.approx(-0.5, abs=0.02)
        assert samples.std().item() == pytest.approx(3 / math.sqrt(12), abs=0.02)

    def test_takes_two_bytes_a_value(self) -> None:
        buffer = self.build()
        assert buffer.samples.numel() * buffer.samples.element_size() == 2 * 20 * 3 * 4**2

    def test_chains_go_on_where_they_ended(self) -> None:
        buffer = self.build()
        starts = draw(buffer)
        assert torch.equal(starts.images, buffer.samples[starts.slots].float())
        assert len(set(starts.slots.tolist())) == 6
        ended = torch.full((6, 3, 4, 4), 0.25)
        buffer.put(starts, ended, num_steps=7)
        again = draw(buffer)
        assert torch.equal(again.images, ended)
        assert again.num_steps.tolist() == [7] * 6
        assert int(buffer.num_steps.sum()) == 42  # all others are as they were

    def test_restarts_at_noise_with_the_probability_given(self) -> None:
        buffer = self.build()
        buffer.samples.fill_(50.0)
        fresh = 0
        for seed in range(200):
            starts = draw(buffer, restart=0.25, seed=seed)
            new = (starts.images < 40).flatten(1).all(dim=1)
            assert torch.equal(new, starts.restarted)
            assert ((starts.images[new] >= -2) & (starts.images[new] <= 1)).all()
            fresh += int(new.sum())
        assert fresh / 1200 == pytest.approx(0.25, abs=0.04)

    def test_a_chain_that_starts_again_has_no_steps_behind_it(self) -> None:
        buffer = self.build()
        buffer.num_steps.fill_(100)
        starts = draw(buffer, restart=0.5, seed=3)
        assert starts.num_steps.tolist() == [0 if new else 100 for new in starts.restarted]
        buffer.put(starts, starts.images, num_steps=5)
        assert torch.equal(buffer.num_steps[starts.slots], starts.num_steps + 5)

    def test_draws_are_those_of_the_generator_alone(self) -> None:
        first, second = self.build(), self.build()
        torch.manual_seed(1)
        a = draw(first, restart=0.5, seed=4)
        torch.manual_seed(2)
        b = draw(second, restart=0.5, seed=4)
        assert torch.equal(a.images, b.images)
        assert not torch.equal(a.slots, draw(first, seed=5).slots)
