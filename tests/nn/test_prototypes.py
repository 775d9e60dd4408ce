import torch

from raysl.nn.prototypes import Prototypes


def test_have_length_1_and_are_exact_under_autocast() -> None:
    layer = Prototypes(5, 7, learn_length=False)
    x = torch.randn(3, 5)
    expected = x @ (layer.weight / layer.weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.clone()))
        torch.testing.assert_close(layer(x), expected)


def test_a_learnt_length_begins_at_1_and_scales_the_scores() -> None:
    layer = Prototypes(5, 7, learn_length=True)
    x = torch.randn(3, 5)
    before = layer(x)
    assert layer.length is not None
    with torch.no_grad():
        layer.length[2] = 3.0
    torch.testing.assert_close(layer(x)[:, 2], 3 * before[:, 2])
