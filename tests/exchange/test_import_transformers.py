"""Folders of transformers' save_pretrained, its state dicts, and DINOv2 by its authors."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raysl.encoder.file import load_encoder, load_weights
from raysl.errors import DataError
from raysl.exchange.import_encoder import ImportConfig, Imported, import_encoder
from raysl.nn.backbones import build_backbone

SIZES = {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
TINY = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768, **SIZES}
# What version 4 and save_pretrained of version 5 call what version 5's modules call otherwise.
OLD_NAMES = {
    r"^((?:\w+\.)?)layers\.": r"\1encoder.layer.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
}
OLD_MLP = {r"\.mlp\.fc1\.": ".intermediate.dense.", r"\.mlp\.fc2\.": ".output.dense."}


def lively(net: Any) -> Any:
    """Give norms, statistics and layer scales values unlike those at the start."""
    torch.manual_seed(1)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif value.ndim == 1 and value.is_floating_point():
            value.data.add_(0.1 * torch.randn_like(value))
    return net.eval()


def bring(path: Path, tmp_path: Path, **settings: Any) -> tuple[Imported, nn.Module]:
    output = tmp_path / "out" / "encoder.safetensors"
    imported = import_encoder(path, ImportConfig(**settings), output, layout="auto")
    return imported, load_encoder(output)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def saved(net: Any, folder: Path, **processor: Any) -> Path:
    net.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


class TestFolders:
    @torch.no_grad()
    def test_vit_with_its_heads_its_epsilon_and_its_normalisation(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        net = lively(transformers.ViTModel(transformers.ViTConfig(**TINY)))
        folder = saved(net, tmp_path / "vit", image_mean=[0.5] * 3, image_std=[0.5] * 3)
        imported, encoder = bring(folder, tmp_path)
        images = torch.randn(2, 3, 32, 32)
        close(encoder(images), net(images).last_hidden_state[:, 0])
        assert imported.layout == "transformers"
        section = imported.backbone.model_dump(exclude_defaults=True)
        sizes = {"patch_size_px": 8, "depth": 2, "num_heads": 6, "norm_eps": 1e-12}
        assert section == {"name": "vit_tiny", **sizes}
        assert (imported.mean, imported.std) == ((0.5,) * 3, (0.5,) * 3)
        assert imported.told == "config.json and preprocessor_config.json"
        assert [guess.partition("=")[0] for guess in imported.guessed] == ["backbone.pool"]

    @torch.no_grad()
    def test_vit_mae_without_its_decoder(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        decoder = {f"decoder_{key}": value for key, value in small.items()}
        config = transformers.ViTMAEConfig(
            **TINY, **decoder, decoder_intermediate_size=64, mask_ratio=0.0
        )
        net = lively(transformers.ViTMAEForPreTraining(config))
        imported, encoder = bring(saved(net, tmp_path / "mae"), tmp_path)
        images = torch.randn(2, 3, 32, 32)
        # It shuffles the patches, which changes nothing for the class token but the order of sums.
        close(encoder(images), net.vit(images).last_hidden_state[:, 0])
        assert imported.taken == "the encoder (vit.)"
        assert imported.backbone.num_heads == 6
        assert any(guess.startswith("mean=[0.485,") for guess in imported.guessed)

    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    @torch.no_grad()
    def test_resnet(self, tmp_path: Path, kind: str) -> None:
        transformers = pytest.importorskip("transformers")
        basic = kind == "basic"
        config = transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 32, 64] if basic else [32, 64, 128, 256],
            depths=[2, 2, 2, 2] if basic else [3, 4, 6, 3],
            layer_type=kind,
        )
        net = lively(transformers.ResNetForImageClassification(config))
        imported, encoder = bring(saved(net, tmp_path / "resnet"), tmp_path)
        images = torch.randn(2, 3, 64, 64).double()
        close(encoder.double()(images), net.resnet.double()(images).pooler_output.flatten(1))
        section = {"name": imported.backbone.name, "width": imported.backbone.width}
        assert section == {"name": "resnet18" if basic else "resnet50", "width": 0.125}

    @pytest.mark.parametrize("registers", [0, 4])
    @torch.no_grad()
    def test_dinov2(self, tmp_path: Path, registers: int) -> None:
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("timm")
        sizes = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
        if registers:
            config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
            net = transformers.Dinov2WithRegistersModel(config)
        else:
            net = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
        net = lively(net)
        imported, encoder = bring(saved(net, tmp_path / "dinov2"), tmp_path)
        images = torch.randn(2, 3, 56, 56)
        close(encoder(images), net(images).pooler_output)
        kind = "_reg4" if registers else ""
        assert imported.backbone.name == f"timm:vit_small_patch14{kind}_dinov2"
        assert imported.image_size_px == 56

    def test_what_ours_are_not_is_refused(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        net = transformers.ViTModel(transformers.ViTConfig(**TINY, hidden_act="relu"))
        with pytest.raises(DataError, match=r"hidden_act=relu; raysl's networks have gelu"):
            bring(saved(net, tmp_path / "vit"), tmp_path)


@pytest.mark.parametrize("old", [True, False])
@torch.no_grad()
def test_a_state_dict_alone_under_old_and_new_names(tmp_path: Path, *, old: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = lively(transformers.ViTModel(transformers.ViTConfig(**TINY | {"num_attention_heads": 3})))
    state = net.state_dict()
    if old:
        state = {old_name(name): value for name, value in state.items()}
        # The names are those of a file of save_pretrained.
        assert state.keys() == load_file(saved(net, tmp_path / "f") / "model.safetensors").keys()
    path = tmp_path / "state.pth"
    torch.save({"model": {f"vit.{name}": value for name, value in state.items()}}, path)
    imported, encoder = bring(path, tmp_path, backbone={"norm_eps": 1e-12})
    images = torch.randn(2, 3, 32, 32)
    close(encoder(images), net(images).last_hidden_state[:, 0])
    assert any(guess.startswith("backbone.num_heads=3 ") for guess in imported.guessed)
    backbone = build_backbone(imported.backbone, image_size_px=32).eval()
    assert load_weights(backbone, path).startswith("the encoder (model/vit.)")
    close(backbone(images), encoder(images))


def old_name(name: str) -> str:
    for new, old in (OLD_NAMES | OLD_MLP).items():
        name = re.sub(new, old, name)
    return name


class PaperDINOv2(nn.Module):
    """ViT-S/14 of DINOv2 under its authors' names: layer scales, perhaps registers."""

    def __init__(self, *, registers: int, side: int = 3) -> None:
        super().__init__()
        dim = 384
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + side**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, dim))
        self.registers = registers
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 14, 14)
        self.blocks = nn.ModuleList(self.block(dim) for _ in range(12))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def block(self, dim: int) -> nn.Module:
        block = nn.Module()
        block.norm1, block.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        block.attn, block.mlp = nn.Module(), nn.Module()
        block.ls1, block.ls2 = nn.Module(), nn.Module()
        block.ls1.gamma, block.ls2.gamma = (nn.Parameter(torch.rand(dim)) for _ in range(2))
        block.attn.qkv, block.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        return block

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        tokens = tokens + self.pos_embed
        if self.registers:  # after the positions, behind the class token
            registers = self.register_tokens.expand(len(images), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1)
        for block in self.blocks:
            n, length, dim = tokens.shape
            qkv = block.attn.qkv(block.norm1(tokens)).reshape(n, length, 3, 6, 64)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mixed = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).reshape(n, length, dim)
            tokens = tokens + block.ls1.gamma * block.attn.proj(mixed)
            hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(tokens)))
            tokens = tokens + block.ls2.gamma * block.mlp.fc2(hidden)
        return self.norm(tokens)[:, 0]


def released(state: dict[str, Tensor]) -> Any:
    return state


def trained(state: dict[str, Tensor]) -> Any:
    """train.py's teacher_checkpoint.pth of blocks in four chunks, which keep their numbers."""
    chunked = {}
    for name, value in state.items():
        match = re.match(r"blocks\.(\d+)\.", name)
        new = name if match is None else f"blocks.{int(match[1]) // 3}.{name.partition('.')[2]}"
        chunked[f"backbone.{new}"] = value
    return {"teacher": chunked | {"dino_head.mlp.0.weight": torch.ones(2, 2)}}


@pytest.mark.parametrize("written", [released, trained])
@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_dinov2_by_its_authors(
    tmp_path: Path, registers: int, written: Callable[[dict[str, Tensor]], Any]
) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    net = PaperDINOv2(registers=registers).eval()
    torch.save(written(net.state_dict()), tmp_path / "dinov2.pth")
    imported, encoder = bring(tmp_path / "dinov2.pth", tmp_path)
    images = torch.randn(2, 3, 42, 42)
    close(encoder(images), net(images))
    assert (imported.layout, imported.image_size_px) == ("dinov2", 42)
    taken = "the network (the whole file)" if written is released else "the teacher (teacher/backbo"
    assert imported.taken.startswith(taken)
