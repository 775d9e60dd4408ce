import math

import pytest
import torch

from raysl.nn.perturbation import perturb


class TestPerturb:
    def test_turns_by_one_two_and_three_quarters_each_as_often(self) -> None:
        torch.manual_seed(0)
        images = torch.randn(1, 3, 4, 4).expand(3000, 3, 4, 4)
        turned, places = perturb(images, ("turn",), (0.1, 0.1))
        counts = [
            int((turned == images.rot90(k, (2, 3))).flatten(1).all(dim=1).sum()) for k in range(4)
        ]
        assert counts[0] == 0
        assert sum(counts) == 3000
        assert min(counts[1:]) > 900
        assert (places == 0).all()

    def test_noise_has_a_deviation_that_is_uniform_in_its_logarithm(self) -> None:
        torch.manual_seed(0)
        images = torch.randn(2000, 3, 8, 8)
        noisy, _ = perturb(images, ("gaussian",), (0.01, 1.0))
        logs = (noisy - images).flatten(1).std(dim=1).log()
        low, high = math.log(0.01), 0.0
        assert logs.mean().item() == pytest.approx((low + high) / 2, abs=0.1)
        assert logs.std().item() == pytest.approx((high - low) / math.sqrt(12), abs=0.05)
        assert logs.min() > low - 0.3
        assert logs.max() < high + 0.3

    def test_a_name_given_twice_comes_twice_as_often_under_its_first_place(self) -> None:
        torch.manual_seed(0)
        images = torch.randn(3000, 3, 2, 2)
        noise, places = perturb(images, ("turn", "gaussian", "turn"), (0.1, 0.1))
        assert places.unique().tolist() == [0, 1]
        assert (places == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.03)
        kept = (noise.flatten(1).sort().values == images.flatten(1).sort().values).all(dim=1)
        assert torch.equal(kept, places == 0)

    def test_images_are_not_changed_and_noise_carries_no_gradient(self) -> None:
        images = torch.randn(4, 3, 4, 4, requires_grad=True)
        before = images.detach().clone()
        noise, _ = perturb(images, ("turn", "gaussian"), (0.1, 0.2))
        assert not noise.requires_grad
        assert torch.equal(images, before)
