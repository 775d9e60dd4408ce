import copy

import pytest
import torch
from torch import nn

from raysl.nn.ema import ema_update_


@pytest.fixture
def online() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))


@pytest.fixture
def target() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    return net.requires_grad_(False)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_each_number_is_momentum_of_the_old_and_the_rest_of_the_new(
    online: nn.Module, target: nn.Module, momentum: float
) -> None:
    before = copy.deepcopy(target)
    ema_update_(target, online, momentum=momentum)
    for now, old, new in zip(
        target.parameters(), before.parameters(), online.parameters(), strict=True
    ):
        expected = momentum * old.double() + (1 - momentum) * new.double()
        torch.testing.assert_close(now.double(), expected, rtol=1e-6, atol=1e-7)


def test_momentum_one_changes_not_a_bit_and_zero_copies(
    online: nn.Module, target: nn.Module
) -> None:
    before = copy.deepcopy(target)
    ema_update_(target, online, momentum=1.0)
    assert all(map(torch.equal, target.parameters(), before.parameters()))
    ema_update_(target, online, momentum=0.0)
    assert all(map(torch.equal, target.parameters(), online.parameters()))


def test_the_online_network_is_not_changed(online: nn.Module, target: nn.Module) -> None:
    before = copy.deepcopy(online.state_dict())
    ema_update_(target, online, momentum=0.3)
    assert all(torch.equal(value, before[name]) for name, value in online.state_dict().items())
    assert not any(
        a.data_ptr() == b.data_ptr()
        for a, b in zip(target.parameters(), online.parameters(), strict=True)
    )


def test_batch_norm_keeps_the_statistics_of_its_own_passes(
    online: nn.Module, target: nn.Module
) -> None:
    online[1].running_mean.fill_(5.0)
    online[1].num_batches_tracked.fill_(7)
    ema_update_(target, online, momentum=0.0)
    assert torch.equal(target[1].running_mean, torch.zeros(3))
    assert int(target[1].num_batches_tracked) == 0


def test_no_graph_is_kept(online: nn.Module, target: nn.Module) -> None:
    ema_update_(target, online, momentum=0.9)
    assert all(p.grad_fn is None and not p.requires_grad for p in target.parameters())
