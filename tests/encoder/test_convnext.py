from typing import Any

import pytest
import torch
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from raysl.encoder.convnext import from_timm, timm_name
from raysl.encoder.stored import stored


@torch.no_grad()
def test_timms_names_are_of_the_same_network() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    dims, depths = (8, 16, 24, 32), (2, 1, 3, 1)
    theirs: Any = timm.create_model("convnext_tiny", dims=dims, depths=depths, num_classes=10)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    state = {name: stored(value) for name, value in theirs.state_dict().items()}
    found = from_timm(state)
    following = (*dims[1:], None)
    blocks = [CNBlockConfig(*sizes) for sizes in zip(dims, following, depths, strict=True)]
    net = ConvNeXt(blocks, num_classes=10).eval()
    renamed = {name.replace("head.fc.", "classifier.2."): v for name, v in found.items()}
    net.load_state_dict({name: value.read() for name, value in renamed.items()}, strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(images), theirs.eval()(images))
    assert all(value.shape == tuple(value.read().shape) for value in found.values())
    assert {timm_name(name) for name in found} == set(state)
