"""Batch norm in one process; tests/distributed has the one over two ranks."""

import copy

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.batchnorm import SplitBatchNorm, SyncBatchNorm, set_batch_norm_scope


def plain_norm(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    norm = kind(3)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    return norm


def images(n: int = 8) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(n, 3, 5, 5) * torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1)
    return x + torch.arange(n).view(n, 1, 1, 1)  # rows differ, so parts of the batch do


def converted(norm: nn.Module, scope: str, splits: int = 1) -> nn.Module:
    return set_batch_norm_scope(copy.deepcopy(norm), scope, num_splits=splits)  # type: ignore[arg-type]


class TestSyncBatchNormAlone:
    @pytest.mark.parametrize("training", [True, False])
    def test_equals_batch_norm(self, training: bool) -> None:
        norm = plain_norm().train(training)
        sync = converted(norm, "sync")
        assert isinstance(sync, SyncBatchNorm)
        assert torch.equal(sync(images()), norm(images()))
        assert all(map(torch.equal, sync.state_dict().values(), norm.state_dict().values()))

    def test_refuses_a_vector(self) -> None:
        with pytest.raises(ShapeError, match=r"got \(3,\)"):
            converted(plain_norm(), "sync")(torch.zeros(3))


class TestSplitBatchNorm:
    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_equals_batch_norm_run_on_each_part(self, parts: int) -> None:
        norm, x = plain_norm(), images().requires_grad_()
        split, same_x = converted(norm, "split", parts), images().requires_grad_()
        each = [copy.deepcopy(norm) for _ in range(parts)]
        expected = torch.cat([n(rows) for n, rows in zip(each, x.chunk(parts), strict=True)])
        output = split(same_x)
        torch.testing.assert_close(output, expected)

        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        (output * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(same_x.grad, x.grad)
        for name in ("weight", "bias"):
            total = sum(getattr(n, name).grad for n in each)
            torch.testing.assert_close(getattr(split, name).grad, total)
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(n, name) for n in each]).mean(0)
            torch.testing.assert_close(getattr(split, name), mean)
        assert int(split.num_batches_tracked) == 1

    def test_parts_have_statistics_of_their_own(self) -> None:
        norm = plain_norm()
        assert not torch.allclose(converted(norm, "split", 2)(images()), norm(images()), atol=0.1)

    def test_works_on_vectors_and_on_channels_last(self) -> None:
        flat = torch.randn(6, 3)
        norm = plain_norm(nn.BatchNorm1d)
        expected = torch.cat([copy.deepcopy(norm)(rows) for rows in flat.chunk(3)])
        torch.testing.assert_close(converted(norm, "split", 3)(flat), expected)
        split = converted(plain_norm(), "split", 2)
        last = images().to(memory_format=torch.channels_last)
        torch.testing.assert_close(copy.deepcopy(split)(last), split(images()))

    def test_while_evaluating_is_batch_norm_for_any_number_of_images(self) -> None:
        norm = plain_norm().eval()
        assert torch.equal(converted(norm, "split", 4)(images(7)), norm(images(7)))

    def test_says_which_batch_does_not_divide(self) -> None:
        with pytest.raises(ShapeError, match="a batch of 7 does not divide into 4 batch"):
            converted(plain_norm(), "split", 4)(images(7))


class TestSetBatchNormScope:
    @pytest.mark.parametrize(
        ("scope", "kind"), [("sync", SyncBatchNorm), ("split", SplitBatchNorm)]
    )
    def test_replaces_every_batch_norm_and_keeps_parameters_and_names(
        self, scope: str, kind: type[nn.Module]
    ) -> None:
        backbone = build_backbone(BackboneConfig(name="resnet18", stem="cifar"))
        parameters = list(backbone.parameters())
        state = backbone.state_dict()
        result = set_batch_norm_scope(backbone, scope, num_splits=2)  # type: ignore[arg-type]
        assert result is backbone
        norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 20
        assert all(type(norm) is kind for norm in norms)
        assert all(a is b for a, b in zip(parameters, backbone.parameters(), strict=True))
        after = backbone.state_dict()
        assert list(after) == list(state)
        assert all(after[name].data_ptr() == state[name].data_ptr() for name in state)

    def test_keeps_mode_momentum_and_fixed_biases(self) -> None:
        norm = nn.BatchNorm1d(3, eps=1e-3, momentum=0.3).eval()
        norm.bias.requires_grad_(False)
        split = set_batch_norm_scope(norm, "split", num_splits=5)
        assert (split.training, split.eps, split.momentum) == (False, 1e-3, 0.3)
        assert split.num_splits == 5
        assert not split.bias.requires_grad
        assert split.weight is norm.weight

    def test_worker_leaves_the_module_as_it_is(self) -> None:
        net = nn.Sequential(plain_norm())
        norm = net[0]
        assert set_batch_norm_scope(net, "worker") is net
        assert net[0] is norm

    @pytest.mark.parametrize("on_cuda", [False, True])
    @pytest.mark.parametrize("scope", ["sync", "split"])
    def test_worker_undoes_the_others(self, scope: str, on_cuda: bool) -> None:
        plain = nn.Sequential(plain_norm())
        net = copy.deepcopy(plain)
        set_batch_norm_scope(net, scope, num_splits=4, on_cuda=on_cuda)  # type: ignore[arg-type]
        weight = net[0].weight
        set_batch_norm_scope(net, "worker")
        assert net[0].weight is weight
        x = images(7)  # divides into no parts
        torch.testing.assert_close(net(x), plain(x))
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value)

    def test_on_cuda_takes_torchs_own_kernels_with_the_same_parameters(self) -> None:
        net = nn.Sequential(plain_norm())
        weight = net[0].weight
        set_batch_norm_scope(net, "sync", on_cuda=True)
        assert type(net[0]) is nn.SyncBatchNorm
        assert net[0].weight is weight

    def test_an_unknown_scope_names_the_allowed_ones(self) -> None:
        with pytest.raises(ConfigError, match=r"'global'; allowed: worker, sync, split"):
            set_batch_norm_scope(nn.Sequential(), "global")  # type: ignore[arg-type]
