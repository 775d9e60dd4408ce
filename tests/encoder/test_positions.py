import pytest
import torch
from torch import Tensor

from raysl.encoder.positions import fixed_positions
from raysl.encoder.stored import StoredTensor, stored
from raysl.nn.vit import sincos_positions


def of_moco_v3(dim: int, side: int) -> Tensor:
    """vits.py of moco-v3, as it stands: grid_w is the first index, that of rows."""
    grid_w, grid_h = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    omega = 1 / 10_000 ** (torch.arange(dim // 4) / (dim // 4))
    out_w = grid_w.flatten()[:, None] * omega
    out_h = grid_h.flatten()[:, None] * omega
    parts = [out_w.sin(), out_w.cos(), out_h.sin(), out_h.cos()]
    return torch.cat([torch.zeros(1, dim), torch.cat(parts, dim=1)])[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_order_is_told_from_the_other_and_from_learnt_ones(dtype: torch.dtype) -> None:
    moco, mae = of_moco_v3(64, 14), sincos_positions(64, 14, 14)
    assert fixed_positions({"pos_embed": stored(moco.to(dtype))}) == "moco_v3"
    assert fixed_positions({"pos_embed": stored(mae.to(dtype))}) == "mae"
    learnt = mae + 0.02 * torch.randn_like(mae)
    assert fixed_positions({"pos_embed": stored(learnt.to(dtype))}) is None


def test_what_cannot_be_told_is_none() -> None:
    one = sincos_positions(64, 1, 1)
    assert fixed_positions({"pos_embed": stored(one)}) is None
    assert fixed_positions({"pos_embed": stored(torch.zeros(1, 8, 64))}) is None
    assert fixed_positions({}) is None

    def damaged() -> Tensor:
        raise ValueError("checksum")

    assert fixed_positions({"pos_embed": StoredTensor((1, 17, 64), damaged)}) is None
