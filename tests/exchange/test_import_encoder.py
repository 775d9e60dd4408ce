"""What `raysl import` refuses, and settings that the tensors do not show."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from raysl.encoder.file import load_encoder, load_weights, read_description
from raysl.errors import ConfigError, DataError
from raysl.exchange.import_encoder import ImportConfig, import_encoder
from raysl.nn.backbones import BackboneConfig, build_backbone

SMALL: dict[str, Any] = {"name": "resnet18", "stem": "cifar", "width": 0.125}


def small(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    backbone = build_backbone(BackboneConfig(**{**SMALL, **changes}), image_size_px=32)
    return backbone.net.state_dict()


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def bring(path: Path, *, layout: str = "auto", **settings: Any) -> Path:
    output = path.parent / "out" / "encoder.safetensors"
    import_encoder(path, ImportConfig(**settings), output, layout=layout)
    return output


class _Attack:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


class TestRefused:
    def refused(self, path: Path, text: str, *, layout: str = "auto", **settings: Any) -> None:
        kinds = (DataError, ConfigError)
        with pytest.raises(kinds, match=rf"^{path}: .*{text}"):
            bring(path, layout=layout, **settings)
        assert not (path.parent / "out").exists()

    def test_a_pickle_that_would_run_code(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        content = {"state_dict": small(), "args": argparse.Namespace(a=_Attack(f"touch {trace}"))}
        self.refused(write(tmp_path / "w.pth", content), "tries to run code when loaded, by posix")
        assert not trace.exists()

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    @pytest.mark.parametrize("kept", [0, 5, 3000, -9])
    def test_a_file_that_was_cut_short(self, tmp_path: Path, name: str, kept: int) -> None:
        path = write(tmp_path / name, small())
        path.write_bytes(path.read_bytes()[:kept])
        self.refused(path, "empty|not a safetensors file|cannot be read")

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    def test_numbers_that_are_not_finite(self, tmp_path: Path, name: str) -> None:
        state = small()
        state["layer1.0.bn1.bias"][0] = float("nan")
        self.refused(write(tmp_path / name, state), r"not all finite: layer1\.0\.bn1\.bias")

    def test_another_architecture(self, tmp_path: Path) -> None:
        words = {"bert.embeddings.weight": torch.ones(3, 3), "bert.layer.0.weight": torch.ones(3)}
        path = write(tmp_path / "w.pth", words)
        self.refused(path, "no tensor names of a ResNet, .* give backbone.name=torchvision")
        self.refused(
            path, "no tensor has a name of one of the backbone's", backbone={"name": "resnet18"}
        )

    def test_a_layer_that_our_networks_do_not_have(self, tmp_path: Path) -> None:
        config = BackboneConfig(name="vit_tiny", patch_size_px=8, depth=1)
        state = build_backbone(config, image_size_px=32).net.state_dict()
        state["blocks.0.ls1.gamma"] = torch.ones(192)  # DINOv2
        text = (
            r"unexpected: blocks\.0\.ls1\.gamma\. Its network has layer .*backbone\.name=timm:NAME"
        )
        self.refused(write(tmp_path / "w.pth", state), text)
        del state["blocks.0.ls1.gamma"], state["blocks.0.attn.qkv.bias"]
        self.refused(write(tmp_path / "w.pth", state), r"missing: blocks\.0\.attn\.qkv\.bias")

    def test_a_size_that_has_no_name(self, tmp_path: Path) -> None:
        state = {"patch_embed.proj.weight": torch.ones(100, 3, 4, 4)}
        self.refused(
            write(tmp_path / "w.pth", state),
            r"no backbone of this size \(patch_size_px=4\); give backbone\.name",
        )

    def test_a_layout_that_the_file_does_not_have(self, tmp_path: Path) -> None:
        path = write(tmp_path / "w.pth", {"state_dict": behind("module.encoder_q.", small())})
        self.refused(
            path,
            r"no network of the layout dino; it holds: state_dict/module\.encoder_q\.",
            layout="dino",
        )

    def test_settings_that_are_not_of_the_backbone(self, tmp_path: Path) -> None:
        path = write(tmp_path / "w.pth", small())
        self.refused(path, "1 bad key.*\n.*depth is for vit", backbone={"depth": 3})
        self.refused(path, "1 bad key.*\n.*'stm'; did you mean 'stem'", backbone={"stm": "small"})

    def test_a_dictionary_that_holds_itself(self, tmp_path: Path) -> None:
        content: dict[str, Any] = {f"again{n}": None for n in range(50)}
        for name in content:
            content[name] = content
        self.refused(write(tmp_path / "w.pth", content), "no tensor names of a ResNet")

    def test_a_full_disk_leaves_the_older_encoder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / "w.pth", small())
        before = bring(path).read_bytes()

        def full(file: Path, data: bytes) -> int:
            with open(file, "wb") as opened:
                opened.write(data[:1000])
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            bring(path)
        assert (tmp_path / "out" / "encoder.safetensors").read_bytes() == before
        assert len(list((tmp_path / "out").iterdir())) == 1


class TestSettings:
    def test_say_what_the_tensors_cannot(self, tmp_path: Path) -> None:
        path = write(tmp_path / "w.pth", behind("encoder.", small()))
        section: dict[str, Any] = {"stem": "small"}
        settings: dict[str, Any] = {
            "image_size_px": 64,
            "mean": (0.5, 0.5, 0.5),
            "std": (1.0, 1.0, 1.0),
        }
        imported = import_encoder(
            path, ImportConfig(backbone=section, **settings), tmp_path / "e.safetensors",
            layout="auto",
        )  # fmt: skip
        assert imported.guessed == ()
        known = read_description(tmp_path / "e.safetensors")
        assert (known["image_size_px"], known["mean"], known["std"]) == (64, [0.5] * 3, [1.0] * 3)
        backbone = build_backbone(BackboneConfig(**{**SMALL, **section})).eval()
        load_weights(backbone, path)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(load_encoder(tmp_path / "e.safetensors")(images), backbone(images))

    def test_a_name_of_torchvision_needs_no_recognition(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        net = torchvision.models.shufflenet_v2_x0_5().eval()
        path = write(
            tmp_path / "w.pth", {"state_dict": behind("module.backbone.", net.state_dict())}
        )
        output = bring(path, backbone={"name": "torchvision:shufflenet_v2_x0_5"})
        images = torch.randn(2, 3, 64, 64)
        net.fc = torch.nn.Identity()
        with torch.no_grad():
            torch.testing.assert_close(load_encoder(output)(images), net(images))

    def test_moco_v3_attention_is_not_mistaken_for_deit_s(self, tmp_path: Path) -> None:
        config = BackboneConfig(name="vit_small", patch_size_px=8, depth=1)
        backbone = build_backbone(config, image_size_px=32)
        path = write(tmp_path / "w.pth", behind("base_encoder.", backbone.net.state_dict()))
        with pytest.raises(DataError, match=r"has 12 attention heads; set backbone\.num_heads=12"):
            load_weights(backbone, path)
