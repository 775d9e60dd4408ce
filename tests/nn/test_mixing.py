import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.nn.mixing import mix_batch

CLASSES = 6
KINDS = [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]
every_kind = pytest.mark.parametrize(("mixup", "cutmix"), KINDS)


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    """Image i is 3 ** i everywhere, and of class i: a pixel tells which images it is made of."""
    levels = 3.0 ** torch.arange(n, dtype=torch.float64)
    labels = torch.arange(n) % CLASSES
    return levels.view(n, 1, 1, 1).expand(n, 3, 9, 12).clone(), F.one_hot(labels, CLASSES).double()


def mixed(seed: int, *, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return mix_batch(*batch(), mixup=mixup, cutmix=cutmix)


def is_cut(images: Tensor) -> bool:
    """Whether every pixel is one of an original image."""
    return bool(torch.isin(images, batch()[0].unique()).all())


@every_kind
class TestMixBatch:
    def test_keeps_the_sum_of_the_images_and_of_the_targets(
        self, mixup: float, cutmix: float
    ) -> None:
        for seed in range(8):
            images, targets = mixed(seed, mixup=mixup, cutmix=cutmix)
            torch.testing.assert_close(images.sum(0), batch()[0].sum(0))
            torch.testing.assert_close(targets.sum(0), batch()[1].sum(0))

    def test_targets_stay_probabilities(self, mixup: float, cutmix: float) -> None:
        for seed in range(8):
            _, targets = mixed(seed, mixup=mixup, cutmix=cutmix)
            assert targets.min() >= 0
            torch.testing.assert_close(targets.sum(1), torch.ones(6, dtype=torch.float64))

    def test_targets_have_the_share_that_the_pixels_have(self, mixup: float, cutmix: float) -> None:
        for seed in range(8):
            images, targets = mixed(seed, mixup=mixup, cutmix=cutmix)
            levels = batch()[0][:, 0, 0, 0]
            for i in range(6):
                own, other = float(levels[i]), float(levels[5 - i])
                share = (float(images[i].mean()) - other) / (own - other)
                assert float(targets[i, i]) == pytest.approx(share, abs=1e-9)
                assert float(targets[i, 5 - i]) == pytest.approx(1 - share, abs=1e-9)

    def test_is_a_function_of_the_global_generator(self, mixup: float, cutmix: float) -> None:
        first, again = (mixed(3, mixup=mixup, cutmix=cutmix) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        found = {float(mixed(seed, mixup=mixup, cutmix=cutmix)[1][0, 0]) for seed in range(8)}
        assert len(found) > 4

    def test_leaves_what_it_was_given_as_it_is(self, mixup: float, cutmix: float) -> None:
        images, targets = batch()
        for seed in range(4):
            torch.manual_seed(seed)
            mix_batch(images, targets, mixup=mixup, cutmix=cutmix)
        assert torch.equal(images, batch()[0])
        assert torch.equal(targets, batch()[1])


def test_mixup_takes_one_mean_for_all_pixels() -> None:
    for seed in range(8):
        images, _ = mixed(seed, mixup=0.8, cutmix=0.0)
        assert not is_cut(images)
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))


def test_cutmix_takes_the_same_rectangle_of_every_image() -> None:
    for seed in range(8):
        images, _ = mixed(seed, mixup=0.0, cutmix=1.0)
        assert is_cut(images)
        foreign = images != batch()[0]
        assert torch.equal(foreign, foreign[:1, :1].expand_as(foreign))
        rows, columns = foreign[0, 0].any(1), foreign[0, 0].any(0)
        assert torch.equal(foreign[0, 0], rows[:, None] & columns[None, :])
        for line in (rows, columns):
            inside = line.nonzero().flatten().tolist()
            assert inside == list(range(min(inside, default=0), max(inside, default=-1) + 1))


def test_with_both_each_batch_gets_one_of_them() -> None:
    cuts = [is_cut(mixed(seed, mixup=0.8, cutmix=1.0)[0]) for seed in range(40)]
    assert 8 < sum(cuts) < 32


def test_a_large_alpha_mixes_halves() -> None:
    _, targets = mixed(0, mixup=1e6, cutmix=0.0)
    assert float(targets[0, 0]) == pytest.approx(0.5, abs=0.01)
