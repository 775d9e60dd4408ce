"""The end of raysl/train/batches.py that turns pixels into views; test_loop.py has the loop."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from raysl.train.batches import as_tensor, input_converter, view_converter

MEAN = (0.4, 0.5, 0.6)
STD = (0.2, 0.25, 0.3)


def pixels(views: int = 2, side: int = 5, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (3, views, side, side, 3), dtype=np.uint8)


def convert(batch: dict[str, Any], *, channels_last: bool = False) -> list[Tensor]:
    device = torch.device("cpu")
    return view_converter(device=device, mean=MEAN, std=STD, channels_last=channels_last)(batch)


@pytest.mark.parametrize("channels_last", [False, True])
def test_each_number_is_the_pixel_less_the_mean_over_the_deviation(channels_last: bool) -> None:
    array = pixels()
    views = convert({"views_0": array, "index": np.arange(3)}, channels_last=channels_last)
    assert [tuple(view.shape) for view in views] == [(3, 3, 5, 5)] * 2
    for n, v, row, column, c in np.ndindex(array.shape):
        expected = (array[n, v, row, column, c] / 255 - MEAN[c]) / STD[c]
        assert views[v][n, c, row, column].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_views_have_the_layout_that_was_asked_for(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for view in convert({"views_0": pixels()}, channels_last=channels_last):
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_an_encoder_takes_is_the_same_to_the_bit_as_a_view_of_training(
    channels_last: bool,
) -> None:
    array = pixels(1)[:, 0]
    device = torch.device("cpu")
    to_input = input_converter(device=device, mean=MEAN, std=STD, channels_last=channels_last)
    (view,) = convert({"views_0": array[:, None]}, channels_last=channels_last)
    found = to_input(array)
    assert torch.equal(found, view)
    assert found.stride() == view.stride()


def test_groups_of_views_follow_each_other() -> None:
    large, small = pixels(2, 6), pixels(3, 4, seed=1)
    views = convert({"views_1": small, "step": np.zeros(3), "views_0": large})
    assert [view.shape[-1] for view in views] == [6, 6, 4, 4, 4]
    torch.testing.assert_close(views[4], convert({"views_0": small})[2])


def test_arrays_that_cannot_be_written_to_are_taken_quietly_and_left_as_they_are() -> None:
    array = pixels()
    before = array.copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert({"views_0": array})
    np.testing.assert_array_equal(array, before)
    array.flags.writeable = True
    convert({"views_0": array}, channels_last=True)
    np.testing.assert_array_equal(array, before)


def test_wrapping_an_array_does_not_copy_it() -> None:
    array = pixels()
    assert as_tensor(array).data_ptr() == array.ctypes.data


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_column_in_parts_gives_what_it_gives_whole(channels_last: bool) -> None:
    array = pixels()
    parts = (array[:1], array[1:])
    whole = convert({"views_0": array}, channels_last=channels_last)
    for one, other in zip(
        convert({"views_0": parts}, channels_last=channels_last), whole, strict=True
    ):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
