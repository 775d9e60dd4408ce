"""Checkpoints as the authors' codes write them, made here with random weights.

Each layout's model is defined here by itself, as its authors describe it; what is imported must
give that model's features.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from raysl.encoder.file import load_encoder, load_weights
from raysl.encoder.networks import choose, find_networks
from raysl.encoder.read import read_content
from raysl.exchange.import_encoder import ImportConfig, Imported, import_encoder
from raysl.nn.backbones import build_backbone
from raysl.nn.vit import sincos_positions

SIZE_PX = 32


class PaperViT(nn.Module):
    """A ViT as in DINO's, MAE's and MoCo v3's code, written from the papers' equations."""

    def __init__(
        self, *, dim: int, heads: int, depth: int, patch: int, mean_then_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.mean_then_norm = heads, mean_then_norm
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (SIZE_PX // patch) ** 2, dim) * 0.02)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv, block.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
            self.blocks.append(block)
        norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.normal_(norm.weight)
        self.add_module("fc_norm" if mean_then_norm else "norm", norm)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            n, length, dim = tokens.shape
            qkv = block.attn.qkv(block.norm1(tokens)).reshape(n, length, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT / (dim / self.heads) ** 0.5).softmax(-1)
            tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).reshape(n, length, dim))
            hidden = block.mlp.fc1(block.norm2(tokens))
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            tokens = tokens + block.mlp.fc2(hidden)
        if self.mean_then_norm:
            return self.fc_norm(tokens[:, 1:].mean(1))
        return self.norm(tokens)[:, 0]


class Block(nn.Module):
    """Two convolutions and a way around them, which torchvision calls downsample."""

    def __init__(self, inner: int, outer: int, stride: int, around: str = "downsample") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.around = nn.Sequential()
        if stride != 1:
            conv = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(outer))
        self._modules[around] = self._modules["around"]
        del self._modules["around"]
        self.name = around

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(maps)).relu()
        return (self.bn2(self.conv2(inner)) + self._modules[self.name](maps)).relu()


def thin_resnet(seed: int = 0) -> nn.Module:
    """A ResNet-18 of 8 to 64 channels with the children of torchvision's."""
    torch.manual_seed(seed)
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    net.relu, net.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    for number, (inner, outer) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)], 1):
        layer = nn.Sequential(Block(inner, outer, 1 + (number > 1)), Block(outer, outer, 1))
        net.add_module(f"layer{number}", layer)
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)
    return lively(net)


def generated_resnet() -> nn.Module:
    """lightly's ResNetGenerator("resnet-18", width=0.125): a 3 x 3 stem, no ReLU and no pooling
    among the children, and `shortcut` for `downsample`."""
    torch.manual_seed(0)
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
    for number, (inner, outer) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)], 1):
        first = Block(inner, outer, 1 + (number > 1), around="shortcut")
        net.add_module(f"layer{number}", nn.Sequential(first, Block(outer, outer, 1, "shortcut")))
    net.linear = nn.Linear(64, 10)
    return lively(net)


def torchvision_resnet(name: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = getattr(torchvision.models, name)()
    return lively(net)


def lively(net: nn.Module) -> nn.Module:
    """Give norms statistics and shifts unlike those at the start."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return net.eval()


def without_head(net: nn.Module) -> nn.Module:
    body = nn.Sequential(*list(net.children())[:-1], nn.Flatten())
    return body.eval()


def vit(seed: int = 0, **options: Any) -> PaperViT:
    torch.manual_seed(seed)
    sizes = {"dim": 192, "heads": 3, "depth": 2, "patch": 8} | options
    return PaperViT(**sizes).eval()


def behind(prefix: str, net: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    state = net.state_dict() if isinstance(net, nn.Module) else net
    return {prefix + name: value for name, value in state.items()}


HEAD = {"mlp.0.weight": torch.ones(3, 4), "last_layer.weight_g": torch.ones(5, 1)}
OPTIONS = argparse.Namespace(arch="resnet50", lr=0.03)


class Case(NamedTuple):
    layout: str
    taken: str
    content: Any
    expected: nn.Module
    section: dict[str, Any]


def moco(version: int) -> Case:
    net, other = (thin_resnet(seed) for seed in (0, 1))
    fc = nn.Linear(64, 128) if version == 1 else nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    net.fc = fc
    state = behind("module.encoder_k.", other) | behind("module.encoder_q.", net)
    state |= {"module.queue": torch.randn(128, 4), "module.queue_ptr": torch.zeros(1).long()}
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}
    return Case(
        "moco",
        "the query encoder",
        content,
        without_head(net),
        {"name": "resnet18", "width": 0.125},
    )


def moco_v3_vit() -> Case:
    net, other = (vit(seed, dim=384, heads=12) for seed in (0, 1))
    state = behind("module.base_encoder.", net) | behind("module.base_encoder.head.", HEAD)
    state |= behind("module.momentum_encoder.", other)
    state |= behind("module.predictor.", {"0.weight": torch.ones(2, 2)})
    section = {
        "name": "vit_small", "patch_size_px": 8, "depth": 2, "num_heads": 12, "positions": "sincos"
    }  # fmt: skip
    content = {"state_dict": state, "scaler": {}, "arch": "vit_small"}
    return Case("moco_v3", "the base encoder", content, net, section)


def moco_v3_positions(dim: int, side: int) -> Tensor:
    """vits.py: the first half of the features tells the row, the second one the column."""
    found = torch.zeros(1, 1 + side * side, dim)
    for row in range(side):
        for column in range(side):
            for k in range(dim // 4):
                rate = 10_000 ** -(k / (dim // 4))
                angles = torch.tensor([row * rate, row * rate, column * rate, column * rate])
                values = torch.stack([*angles[:1].sin(), *angles[1:2].cos()])
                values = torch.cat([values, angles[2:3].sin(), angles[3:].cos()])
                found[0, 1 + row * side + column, k :: dim // 4] = values
    return found


def moco_v3_alone(*, linear: bool) -> Case:
    """What convert_to_deit.py and main_lincls.py write: nothing but positions tells the heads."""
    net = vit(dim=384, heads=12)
    with torch.no_grad():
        net.pos_embed.copy_(moco_v3_positions(384, 4))
    content: dict[str, Any] = {"model": net.state_dict()}
    if linear:
        head = {"module.head.weight": torch.ones(10, 384), "module.head.bias": torch.ones(10)}
        content = {"state_dict": behind("module.", net) | head, "arch": "vit_small", "epoch": 90}
    section = moco_v3_vit().section
    return Case("moco_v3", "the encoder", content, net, section)


def moco_v3_resnet() -> Case:
    net = thin_resnet()
    state = behind("module.base_encoder.", net)
    return Case(
        "moco_v3",
        "the base encoder",
        {"state_dict": state},
        without_head(net),
        {"name": "resnet18", "width": 0.125},
    )


def simclr_of_sthalles() -> Case:
    net = thin_resnet()
    net.fc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128))
    content = {"epoch": 100, "arch": "resnet18", "state_dict": behind("backbone.", net)}
    return Case(
        "simclr", "the backbone", content, without_head(net), {"name": "resnet18", "width": 0.125}
    )


def simclr_of_spijkervet() -> Case:
    net = thin_resnet()
    net.fc = nn.Identity()
    projector = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU())
    content = behind("encoder.", net) | behind("projector.", projector)
    return Case(
        "simclr", "the encoder", content, without_head(net), {"name": "resnet18", "width": 0.125}
    )


def simclr_converted() -> Case:
    net = torchvision_resnet("resnet18")
    return Case(
        "torchvision", "the network", {"state_dict": net.state_dict()}, without_head(net),
        {"name": "resnet18"},
    )  # fmt: skip


def dino(*, parallel_teacher: bool) -> Case:
    teacher, student = vit(0, patch=8), vit(1, patch=8)
    inner = "module." if parallel_teacher else ""
    content = {
        "student": behind("module.backbone.", student) | behind("module.head.", HEAD),
        "teacher": behind(f"{inner}backbone.", teacher) | behind(f"{inner}head.", HEAD),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": OPTIONS,
        "dino_loss": {"center": torch.zeros(1, 5)},
        "fp16_scaler": {"scale": 2.0},
    }
    section = {"name": "vit_tiny", "patch_size_px": 8, "depth": 2}
    return Case("dino", "the teacher", content, teacher, section)


def dino_backbone() -> Case:
    net = vit(patch=16)
    section = {"name": "vit_tiny", "depth": 2}
    return Case("timm", "the network", net.state_dict(), net, section)


def dino_resnet() -> Case:
    net = thin_resnet()
    net.fc = nn.Identity()
    return Case(
        "torchvision",
        "the network",
        net.state_dict(),
        without_head(net),
        {"name": "resnet18", "width": 0.125},
    )


def mae_pretrained() -> Case:
    net = vit()
    with torch.no_grad():
        net.pos_embed.copy_(sincos_positions(192, 4, 4))
    decoder = {
        "mask_token": torch.ones(1, 1, 64),
        "decoder_pos_embed": torch.ones(1, 17, 64),
        "decoder_embed.weight": torch.ones(64, 192),
        "decoder_blocks.0.norm1.weight": torch.ones(64),
        "decoder_pred.bias": torch.ones(3),
    }
    content = {"model": net.state_dict() | decoder, "epoch": 400, "args": OPTIONS, "scaler": {}}
    section = {"name": "vit_tiny", "patch_size_px": 8, "depth": 2, "positions": "sincos"}
    return Case("mae", "the encoder", content, net, section)


def mae_released() -> Case:
    """The released encoders come without the decoder."""
    case = mae_pretrained()
    names = ("mask_token", "decoder_")
    model = {k: v for k, v in case.content["model"].items() if not k.startswith(names)}
    return case._replace(content={"model": model})


def mae_finetuned() -> Case:
    net = vit(mean_then_norm=True)
    content = {"model": net.state_dict() | {"head.weight": torch.ones(1000, 192)}}
    section = {"name": "vit_tiny", "patch_size_px": 8, "depth": 2, "pool": "mean_norm"}
    return Case("mae", "the encoder", content, net, section)


def vissl() -> Case:
    net = torchvision_resnet("resnet50")
    trunk = behind("_feature_blocks.", {k: v for k, v in net.state_dict().items() if k[:2] != "fc"})
    model = {"trunk": trunk, "heads": {"0.clf.0.weight": torch.ones(10, 2048)}}
    content = {
        "phase_idx": 2,
        "iteration": 7,
        "classy_state_dict": {
            "base_model": {"model": model, "meters": []},
            "optimizer": {"optim": {"state": {0: {"momentum_buffer": torch.ones(2)}}}},
            "loss": {"center": torch.ones(2)},
        },
        "type": "consolidated",
    }
    return Case("vissl", "the trunk", content, without_head(net), {"name": "resnet50"})


def lightly_sequential() -> Case:
    net, other = thin_resnet(), thin_resnet(1)
    body = nn.Sequential(*list(net.children())[:-1])
    state = behind("backbone_momentum.", nn.Sequential(*list(other.children())[:-1]))
    state |= behind("backbone.", body)
    state |= {"projection_head.layers.0.weight": torch.ones(3, 3)}
    content = {"epoch": 9, "pytorch-lightning_version": "2.2.0", "state_dict": state}
    return Case(
        "lightly", "the backbone", content, without_head(net), {"name": "resnet18", "width": 0.125}
    )


def lightly_generated() -> Case:
    net = generated_resnet()
    body = nn.Sequential(*list(net.children())[:-1], nn.AdaptiveAvgPool2d(1))
    expected = nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *body[2:], nn.Flatten())
    section = {"name": "resnet18", "stem": "cifar", "width": 0.125}
    content = {"state_dict": behind("backbone.", body)}
    return Case("lightly", "the backbone", content, expected.eval(), section)


def lightly_dino() -> Case:
    net, other = vit(0), vit(1)
    state = behind("student_backbone.vit.", other) | behind("teacher_backbone.vit.", net)
    section = {"name": "vit_tiny", "patch_size_px": 8, "depth": 2}
    return Case("lightly", "the teacher's backbone", {"state_dict": state}, net, section)


def lightly_train(*, distilled: bool) -> Case:
    net, other = thin_resnet(), thin_resnet(1)
    bodies = [{k: v for k, v in n.state_dict().items() if k[:2] != "fc"} for n in (net, other)]
    inner = "embedding_model.wrapped_model._features."
    if distilled:
        state = behind(f"student_{inner}", bodies[0]) | behind("teacher_embedding_model.", vit())
        taken = "the student's model"
    else:
        state = behind(f"student_{inner}", bodies[1]) | behind(f"teacher_{inner}", bodies[0])
        taken = "the teacher's model"
    content = {"state_dict": state, "lightly_train": {"models": {"model": net}, "version": "1"}}
    return Case("lightly", taken, content, without_head(net), {"name": "resnet18", "width": 0.125})


CASES = {
    "moco_v1": lambda: moco(1),
    "moco_v2": lambda: moco(2),
    "moco_v3_vit": moco_v3_vit,
    "moco_v3_converted": lambda: moco_v3_alone(linear=False),
    "moco_v3_linear": lambda: moco_v3_alone(linear=True),
    "moco_v3_resnet": moco_v3_resnet,
    "simclr_sthalles": simclr_of_sthalles,
    "simclr_spijkervet": simclr_of_spijkervet,
    "simclr_converted": simclr_converted,
    "dino": lambda: dino(parallel_teacher=False),
    "dino_parallel": lambda: dino(parallel_teacher=True),
    "dino_backbone": dino_backbone,
    "dino_resnet": dino_resnet,
    "mae": mae_pretrained,
    "mae_released": mae_released,
    "mae_finetuned": mae_finetuned,
    "vissl": vissl,
    "lightly_sequential": lightly_sequential,
    "lightly_generated": lightly_generated,
    "lightly_dino": lightly_dino,
    "lightly_train": lambda: lightly_train(distilled=False),
    "lightly_train_distilled": lambda: lightly_train(distilled=True),
}
LEGACY = {"moco_v1", "moco_v2", "dino_resnet"}  # of 2019 to 2021


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_imported_gives_the_features_of_the_layouts_own_definition(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]()
    path, output = tmp_path / "checkpoint.pth.tar", tmp_path / "encoder.safetensors"
    torch.save(case.content, path, _use_new_zipfile_serialization=name not in LEGACY)
    imported = import_encoder(path, ImportConfig(), output, layout="auto")
    # In float64, where the order of sums makes no difference.
    images = torch.randn(3, 3, SIZE_PX, SIZE_PX).double()
    expected = case.expected.double()(images)
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-7)
    close(load_encoder(output).double()(images), expected)
    assert_said(imported, case)
    found = choose(find_networks(read_content(path)), case.layout)
    assert found is not None
    assert found.description == imported.taken

    backbone = build_backbone(imported.backbone, image_size_px=imported.image_size_px).eval()
    said = load_weights(backbone, path)
    assert said.startswith(case.taken)
    close(backbone.double()(images), expected)


def assert_said(imported: Imported, case: Case) -> None:
    section = imported.backbone.model_dump(mode="json", exclude_defaults=True)
    assert {"name": "resnet50", **section} == case.section
    assert imported.layout == case.layout
    assert imported.taken.startswith(f"{case.taken} (")
    unnormalised = case.layout == "simclr"
    assert imported.mean == ((0, 0, 0) if unnormalised else (0.485, 0.456, 0.406))
    whose = "none, unnormalised pixels" if unnormalised else "ImageNet's"
    assert sum(f"] ({whose}, " in guess for guess in imported.guessed) == 1
