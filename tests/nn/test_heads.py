import pytest
import torch
from torch import nn

from raysl.errors import ConfigError
from raysl.nn.heads import count_layers, first_layers, projection_mlp


def kinds(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head.children()]


def test_simclr_layout_has_batch_norm_on_every_layer_and_relu_in_between() -> None:
    block = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(projection_mlp(8, 6, 4)) == [*block, "Linear", "BatchNorm1d"]
    assert kinds(projection_mlp(8, 6, 4, num_layers=3)) == [*block, *block, "Linear", "BatchNorm1d"]


def test_widths_go_from_in_over_hidden_to_out() -> None:
    linear = [m for m in projection_mlp(8, 6, 4, num_layers=3) if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(8, 6), (6, 6), (6, 4)]


def test_before_batch_norm_there_is_no_bias() -> None:
    linear = [m for m in projection_mlp(8, 6, 4) if isinstance(m, nn.Linear)]
    assert all(m.bias is None for m in linear)


def test_the_last_batch_norm_has_a_scale_but_a_bias_fixed_at_zero() -> None:
    hidden, last = (m for m in projection_mlp(8, 6, 4) if isinstance(m, nn.BatchNorm1d))
    assert hidden.bias.requires_grad
    assert last.weight.requires_grad
    assert not last.bias.requires_grad
    assert torch.equal(last.bias, torch.zeros(4))


def test_output_of_a_new_simclr_head_is_standardised_over_the_batch() -> None:
    torch.manual_seed(0)
    output = projection_mlp(8, 6, 4)(torch.randn(64, 8) * 3 + 1)
    assert torch.allclose(output.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(output.var(0, unbiased=False), torch.ones(4), atol=1e-3)


def test_without_batch_norm_layers_have_biases() -> None:
    head = projection_mlp(8, 6, 4, batch_norm=False)
    assert kinds(head) == ["Linear", "ReLU", "Linear"]
    assert all(p.requires_grad for p in head.parameters())
    assert [tuple(p.shape) for p in head.parameters()] == [(6, 8), (6,), (4, 6), (4,)]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_one_layer_is_a_linear_map_that_ignores_the_hidden_width(batch_norm: bool) -> None:
    head = projection_mlp(8, 999, 4, num_layers=1, batch_norm=batch_norm)
    assert kinds(head) == (["Linear", "BatchNorm1d"] if batch_norm else ["Linear"])
    assert tuple(head[0].weight.shape) == (4, 8)


def test_a_plain_last_batch_norm_standardises_and_learns_nothing() -> None:
    torch.manual_seed(0)
    head = projection_mlp(8, 6, 4, num_layers=3, last_norm="plain")
    assert kinds(head) == kinds(projection_mlp(8, 6, 4, num_layers=3))
    assert list(head[-1].parameters()) == []
    assert all(p.requires_grad for p in head.parameters())
    output = head(torch.randn(64, 8) * 3 + 1)
    assert torch.allclose(output.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(output.var(0, unbiased=False), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("last_bias", [True, False])
def test_without_a_last_batch_norm_the_last_layer_may_have_a_bias(last_bias: bool) -> None:
    head = projection_mlp(8, 6, 4, last_norm="none", last_bias=last_bias)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is None
    assert (head[-1].bias is not None) == last_bias


@pytest.mark.parametrize("last_norm", ["scaled", "plain", "none"])
def test_without_batch_norm_there_is_none_at_the_end_either(last_norm: str) -> None:
    head = projection_mlp(8, 6, 4, batch_norm=False, last_norm=last_norm, last_bias=False)
    assert kinds(head) == ["Linear", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in head.parameters()] == [(6, 8), (6,), (4, 6)]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_random_numbers_are_drawn_in_the_order_of_the_layers(batch_norm: bool) -> None:
    torch.manual_seed(0)
    head = projection_mlp(8, 6, 4, num_layers=3, batch_norm=batch_norm)
    torch.manual_seed(0)
    for layer in head:
        if isinstance(layer, nn.Linear):
            drawn = nn.Linear(layer.in_features, layer.out_features, bias=not batch_norm)
            assert torch.equal(layer.weight, drawn.weight)


class TestFirstLayers:
    def test_keep_batch_norm_and_relu_of_their_layer(self) -> None:
        """Fine-tuning from layer 1 begins with W1 and its nonlinearity, as in SimCLR v2."""
        head = projection_mlp(8, 6, 4, num_layers=3)
        block = ["Linear", "BatchNorm1d", "ReLU"]
        assert kinds(first_layers(head, 0)) == []
        assert kinds(first_layers(head, 1)) == block
        assert kinds(first_layers(head, 2)) == [*block, *block]
        assert kinds(first_layers(head, 3)) == kinds(head)

    def test_without_batch_norm_keep_relu(self) -> None:
        head = projection_mlp(8, 6, 4, num_layers=2, batch_norm=False)
        assert kinds(first_layers(head, 1)) == ["Linear", "ReLU"]

    def test_are_the_same_modules_and_nothing_is_the_identity(self) -> None:
        head = projection_mlp(8, 6, 4)
        assert first_layers(head, 1)[0] is head[0]
        x = torch.randn(3, 8)
        assert torch.equal(first_layers(head, 0)(x), x)
        assert torch.equal(first_layers(nn.Sequential(), 0)(x), x)

    @pytest.mark.parametrize("num_layers", [-1, 4])
    def test_more_than_there_are_is_an_error(self, num_layers: int) -> None:
        head = projection_mlp(8, 6, 4, num_layers=3)
        assert count_layers(head) == 3
        with pytest.raises(ConfigError, match=f"{num_layers} layers of a head that has 3"):
            first_layers(head, num_layers)
