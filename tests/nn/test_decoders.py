import pytest
import torch
from torch import nn

from raysl.nn.decoders import Discriminator, UpConvDecoder, num_doublings


@pytest.mark.parametrize(
    ("size", "doublings"), [(4, 1), (8, 1), (16, 2), (64, 4), (112, 5), (128, 5), (255, 6)]
)
def test_four_pixels_double_to_the_power_of_two_that_is_nearest(size: int, doublings: int) -> None:
    assert num_doublings(size) == doublings


@pytest.mark.parametrize(
    ("size", "widths"),
    [(64, [512, 256, 128, 64, 3]), (128, [512, 256, 128, 64, 64, 3]), (16, [128, 64, 3])],
)
def test_decoder_has_the_channels_of_the_authors_code(size: int, widths: list[int]) -> None:
    layers = UpConvDecoder(10, size_px=size).layers
    assert [m.out_channels for m in layers if isinstance(m, nn.ConvTranspose2d)] == widths


@pytest.mark.parametrize(
    ("size", "widths"),
    [(64, [64, 128, 256, 512, 1]), (128, [64, 64, 128, 256, 512, 1]), (16, [64, 128, 1])],
)
def test_discriminator_has_the_channels_of_the_authors_code(size: int, widths: list[int]) -> None:
    layers = Discriminator(size_px=size).layers
    assert [m.out_channels for m in layers if isinstance(m, nn.Conv2d)] == widths


@pytest.mark.parametrize("size", [5, 16, 30, 64])
def test_both_take_any_size(size: int) -> None:
    decoder, judge = UpConvDecoder(6, size_px=16, width=2), Discriminator(size_px=16, width=2)
    images = decoder(torch.randn(3, 6), size)
    assert images.shape == (3, 3, size, size)
    assert judge(images).shape == (3,)


def test_without_resizing_the_decoder_is_its_layers() -> None:
    decoder = UpConvDecoder(6, size_px=16, width=2)
    features = torch.randn(3, 6)
    assert torch.equal(decoder(features, 16), decoder.layers(features[:, :, None, None]))


def test_weights_start_with_a_deviation_of_two_hundredths() -> None:
    torch.manual_seed(0)
    for layer in UpConvDecoder(50, size_px=32, width=16).modules():
        if isinstance(layer, nn.ConvTranspose2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert layer.bias is None
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1.0, abs=0.02)
