"""One process; tests/distributed/test_two_ranks.py shows that two give the same features."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from raysl.augment.crop import CropBox, apply_crop, center_box
from raysl.evaluate import features
from raysl.evaluate.features import EvalImages, embed
from raysl.sources.source import ArraySource


def made_up(
    n: int = 10, shape: tuple[int, ...] = (12, 16, 3), *, size_px: int = 8, **settings: Any
) -> EvalImages:
    pixels = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    rows = settings.pop("rows", np.arange(n))
    settings = {"crop_fraction": 1.0, "num_threads": 2} | settings
    source = ArraySource("made up", pixels)
    return EvalImages(source, rows, np.arange(len(rows)) % 3, size_px=size_px, **settings)


def stacked(
    images: EvalImages, places: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.uint8]:
    return np.concatenate(
        list(images.batches(np.arange(len(images)) if places is None else places))
    )


def to_input(pixels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


class TestEvalImages:
    def test_are_the_centred_square_resized(self) -> None:
        images = made_up()
        for place, square in enumerate(stacked(images)):
            middle = images.source.read([place])[0][:, 2:14]  # 12 x 12 of 12 x 16
            np.testing.assert_array_equal(
                square, apply_crop(middle, CropBox(0, 0, 12, 12), size_px=8)
            )

    def test_a_smaller_fraction_sees_a_smaller_square(self) -> None:
        images = made_up(crop_fraction=0.5, size_px=6)
        box = center_box(height=12, width=16, fraction=0.5)
        assert (box.height, box.width) == (6, 6)
        original = images.image(3)[box.top : box.top + 6, box.left : box.left + 6]
        np.testing.assert_array_equal(stacked(images)[3], original)

    def test_come_in_the_order_that_is_asked_for(self) -> None:
        images = made_up(20, rows=np.array([7, 3, 19]))
        everything = made_up(20)
        np.testing.assert_array_equal(stacked(images), stacked(everything)[[7, 3, 19]])
        assert len(images) == 3

    def test_of_all_threads_are_the_same(self) -> None:
        many = stacked(made_up(30, num_threads=4))
        np.testing.assert_array_equal(many, stacked(made_up(30, num_threads=1)))

    @pytest.mark.parametrize(
        "places", [np.arange(7), np.arange(4), np.array([0, 9, 4]), np.arange(10)]
    )
    def test_asked_for_again_are_those_that_are_asked_for(
        self, places: npt.NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ranks embed a share of the images and rank 0 then draws the first so many."""
        monkeypatch.setattr(features, "_BATCH", 6)
        images = made_up(10)
        whole = stacked(images)
        stacked(images, np.arange(5))
        np.testing.assert_array_equal(stacked(images, places), whole[places])

    def test_are_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = made_up()
        whole = stacked(images)
        monkeypatch.setattr(images, "image", None)
        np.testing.assert_array_equal(stacked(images), whole)

    def test_that_would_fill_the_memory_are_read_each_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(features, "_CACHE_BYTES", 10 * 8 * 8 * 3 - 1)
        images = made_up()
        whole = stacked(images)
        images.source.images[:] = 255 - images.source.images
        np.testing.assert_allclose(stacked(images) + whole.astype(int), 255, atol=1)


class TestPixels:
    def test_have_the_size_of_the_images_themselves(self) -> None:
        pixels = made_up(4, (5, 5, 3), size_px=32)
        found = pixels.pixels()
        assert found.dtype == np.float32
        expected = np.stack([pixels.image(place) for place in range(4)]).reshape(4, -1) / 255
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_are_at_most_32_px_a_side(self) -> None:
        assert made_up(2, (40, 50, 3), size_px=64).pixels().shape == (2, 32 * 32 * 3)
        assert made_up(2, (40, 50, 3), size_px=8).pixels().shape == (2, 8 * 8 * 3)

    def test_of_grey_images_have_one_channel(self) -> None:
        images = made_up(3, (6, 6), size_px=6)
        expected = images.source.images.reshape(3, 36) / 255
        np.testing.assert_allclose(images.pixels(), expected, rtol=1e-6)


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(*layers, nn.Flatten())
    net[1].running_mean.fill_(0.3)
    return net


class TestEmbed:
    def test_equals_the_encoder_on_each_image_in_evaluation_mode(self, encoder: nn.Module) -> None:
        images = made_up(11)
        found = embed(encoder, images, to_input=to_input)
        with torch.no_grad():
            rows = [encoder.eval()(to_input(square[None])) for square in stacked(images)]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.cat(rows))

    def test_more_images_than_a_batch_keep_their_order(
        self, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = embed(encoder, made_up(11), to_input=to_input)
        monkeypatch.setattr(features, "_BATCH", 4)
        torch.testing.assert_close(embed(encoder, made_up(11), to_input=to_input), whole)

    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_the_encoder_in_its_mode_and_its_statistics(
        self, encoder: nn.Module, training: bool
    ) -> None:
        encoder.train(training)
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        embed(encoder, made_up(), to_input=to_input)
        assert all(module.training is training for module in encoder.modules())
        assert all(torch.equal(value, before[k]) for k, value in encoder.state_dict().items())

    def test_leaves_the_encoder_in_its_mode_also_if_an_image_cannot_be_read(
        self, encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = made_up()
        monkeypatch.setattr(images, "image", lambda place: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(encoder.train(), images, to_input=to_input)
        assert encoder.training
