import numpy as np
import pytest
import torch

from raysl.errors import ShapeError
from raysl.nn.rotations import rotate


class TestRotate:
    def test_turns_each_image_by_its_own_quarters_like_numpy(self) -> None:
        images = torch.arange(6 * 3 * 5 * 5).view(6, 3, 5, 5)
        turns = torch.tensor([0, 1, 2, 3, 4, 5])
        turned = rotate(images, turns)
        for image, k, got in zip(images, turns.tolist(), turned, strict=True):
            np.testing.assert_array_equal(got, np.rot90(image.numpy(), k, axes=(1, 2)))

    def test_a_quarter_takes_the_upper_right_corner_to_the_upper_left(self) -> None:
        image = torch.tensor([[[[1, 2], [3, 4]]]])
        assert rotate(image, torch.tensor([1])).tolist() == [[[[2, 4], [1, 3]]]]

    def test_four_quarters_are_none(self) -> None:
        images = torch.randn(3, 3, 4, 4)
        turns = torch.tensor([1, 2, 3])
        assert torch.equal(rotate(rotate(images, turns), 4 - turns), images)

    @pytest.mark.parametrize(
        ("shape", "turns", "message"),
        [
            ((2, 3, 4, 5), (2,), r"must be \(N, C, S, S\) to be turned; got \(2, 3, 4, 5\)"),
            ((2, 3, 4, 4), (3,), r"turns must be \(2,\), one per image; got \(3,\)"),
        ],
    )
    def test_says_what_it_cannot_turn(
        self, shape: tuple[int, ...], turns: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            rotate(torch.zeros(shape), torch.zeros(turns, dtype=torch.long))
