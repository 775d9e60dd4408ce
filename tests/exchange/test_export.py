"""Copies in the formats of others, opened as their users open them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysl.encoder.file import load_encoder, read_description, save_encoder
from raysl.errors import ConfigError, DataError, ExportError
from raysl.exchange.export import FORMATS, ExportConfig, Exported, export
from raysl.exchange.exportable import open_exportable
from raysl.exchange.import_encoder import ImportConfig, import_encoder
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.classifier import Classifier, save_classifier

ROOT = Path(__file__).parents[2]
RESNET = {"name": "resnet18"}
CIFAR = {"name": "resnet18", "stem": "cifar"}
VIT = {"name": "vit_tiny", "patch_size_px": 8, "depth": 2, "pool": "mean", "num_heads": 6}
NORMED = {"name": "vit_tiny", "patch_size_px": 8, "depth": 1, "pool": "mean_norm"}
GROUP = {"name": "resnet18", "norm": "group"}
FOREIGN = {"name": "resnet18", "width": 0.125, "selective_kernels": True}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def write(folder: Path, section: dict[str, Any]) -> Path:
    """An encoder whose every tensor differs from a new one's."""
    torch.manual_seed(0)
    config = BackboneConfig(**section)
    backbone = build_backbone(config, image_size_px=32)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module(torch.randn(8, module.num_features, 4, 4) + 0.1)
    description = {
        "backbone": config.model_dump(mode="json"),
        "image_size_px": 32,
        "mean": MEAN,
        "std": STD,
        "method": "simclr",
        "run": "photos",
    }
    save_encoder(folder / "encoder.safetensors", backbone, description=description)
    return folder


def exported(folder: Path, format_name: str, **settings: Any) -> Exported:
    path = folder / "exports" / FORMATS[format_name].file
    return export(open_exportable(folder), format_name, path, ExportConfig(**settings))


def by_lines(done: Exported) -> Any:
    """Run the lines that a person is told to."""
    names: dict[str, Any] = {"images": images().numpy() if done.format == "onnx" else images()}
    exec("\n".join(done.usage), names)
    return (
        torch.as_tensor(names["features"])
        if "features" in names
        else names["model"].eval()(images())
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("format_name", "section"),
    [
        ("torchvision", RESNET),
        ("torchvision", CIFAR),
        ("torchvision", {"name": "torchvision:mobilenet_v3_small"}),
        ("timm", {"name": "resnet18", "stem": "cifar_padded"}),
        ("timm", VIT),
        ("timm", NORMED),
        ("timm", {"name": "timm:mobilenetv4_conv_small_035"}),
        ("timm", {"name": "timm:vit_tiny_patch16_224"}),
        ("onnx", VIT),
        ("torchscript", FOREIGN),
        ("torchscript", VIT),
        ("torch_export", VIT),
        ("huggingface", GROUP),
        ("huggingface", VIT),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
@torch.no_grad()
def test_the_lines_that_are_told_give_the_same_features(
    tmp_path: Path, format_name: str, section: dict[str, Any]
) -> None:
    if format_name in ("timm", "huggingface"):
        pytest.importorskip("timm")
    if format_name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    folder = write(tmp_path, section)
    expected = load_encoder(folder)(images())
    done = exported(folder, format_name)
    assert done.difference <= 1e-5
    torch.testing.assert_close(by_lines(done), expected, rtol=1e-5, atol=1e-5)
    assert [file.name for file in done.path.parent.iterdir()] == [done.path.name]
    if format_name in ("torchvision", "timm", "huggingface"):
        back = tmp_path / "back.safetensors"
        imported = import_encoder(done.path, ImportConfig(), back, layout="auto")
        torch.testing.assert_close(load_encoder(back)(images()), expected, rtol=1e-5, atol=1e-5)
        assert imported.backbone == BackboneConfig(**section)
        description = read_description(back)
        assert (description["mean"], description["std"]) == (MEAN, STD)
        assert description["image_size_px"] == 32


@torch.no_grad()
def test_an_onnx_file_takes_any_batch_and_knows_what_normalises_its_input(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = write(tmp_path, FOREIGN)
    path = exported(folder, "onnx").path
    model = onnx.load(path)
    known = {prop.key: json.loads(prop.value) for prop in model.metadata_props}
    assert (known["mean"], known["std"], known["image_size_px"]) == (MEAN, STD, 32)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [18]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:]) == ("images", [3, 32, 32])
    assert (got.name, got.shape) == ("features", [given.shape[0], 64])
    for count in (1, 9):
        (result,) = session.run(None, {"images": images(count).numpy()})
        torch.testing.assert_close(
            torch.from_numpy(result), load_encoder(folder)(images(count)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("format_name", ["onnx", "torch_export"])
def test_convolutions_leave_as_convolutions(tmp_path: Path, format_name: str) -> None:
    """raysl computes small maps as matrix products; nobody else should have to."""
    if format_name == "onnx":
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    folder = write(tmp_path, {"name": "resnet18", "stem": "small", "width": 0.125})
    path = exported(folder, format_name).path
    if format_name == "onnx":
        count = sum(node.op_type == "Conv" for node in onnx.load(path).graph.node)
    else:
        nodes = torch.export.load(path).graph.nodes
        count = sum("conv2d" in str(node.target) for node in nodes)
    assert count == 20


@torch.no_grad()
def test_a_classifier_gives_its_logits(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    config = BackboneConfig(name="resnet18", stem="cifar", width=0.125)
    head = nn.Sequential(nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    model = Classifier(build_backbone(config), head, ["cat", "dog", "cow"]).eval()
    description = {"backbone": config.model_dump(mode="json"), "image_size_px": 32}
    save_classifier(tmp_path / "classifier.safetensors", model, description=description)
    exportable = open_exportable(tmp_path / "classifier.safetensors")
    done = export(exportable, "onnx", tmp_path / "c.onnx", ExportConfig())
    session = runtime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images().numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images()), rtol=1e-5, atol=1e-5)
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["class_names"]) == ["cat", "dog", "cow"]
    with pytest.raises(ConfigError, match=r"--format timm supports encoders only; .* a classifier"):
        export(exportable, "timm", tmp_path / "c.safetensors", ExportConfig())


class TestHuggingFace:
    def test_transformers_opens_the_folders_without_a_network(self, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        pytest.importorskip("transformers")
        sections: list[dict[str, Any]] = [RESNET, VIT]
        folders = [write_at(tmp_path / section["name"], section) for section in sections]
        paths = [str(exported(folder, "huggingface").path) for folder in folders]
        torch.save(images(), tmp_path / "images.pt")
        script = (
            "import torch, numpy as np; from transformers import AutoImageProcessor, AutoModel\n"
            "images, found = torch.load('images.pt'), []\n"
            f"for path in {paths}:\n"
            "    model = AutoModel.from_pretrained(path).eval()\n"
            "    processor = AutoImageProcessor.from_pretrained(path)\n"
            "    grey = np.full((32, 32, 3), 51, dtype=np.uint8)\n"
            "    pixels = processor(grey, return_tensors='pt')['pixel_values']\n"
            "    with torch.no_grad():\n"
            "        found.append((model(images).pooler_output, pixels))\n"
            "torch.save(found, 'out.pt')\n"
        )
        run_offline(script, tmp_path)
        normalised = [(0.2 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
        for folder, (features, pixels) in zip(
            folders, torch.load(tmp_path / "out.pt"), strict=True
        ):
            with torch.no_grad():
                expected = load_encoder(folder)(images())
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
            assert pixels.shape == (1, 3, 32, 32)
            assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(normalised, abs=1e-5)

    def test_its_card_says_what_goes_in_and_comes_out(self, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        card = (exported(write(tmp_path, VIT), "huggingface").path / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: timm\n")
        assert "vit_tiny, 192 features" in card
        assert "pretrained without labels by simclr" in card
        assert "32 px in [0, 1], minus the mean (0.1, 0.2, 0.3)" in card

    def test_another_export_takes_its_place_and_nothing_else_does(self, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        folder = write(tmp_path, VIT)
        path = exported(folder, "huggingface").path
        (path / "stale.txt").write_text("of the older one")
        exported(folder, "huggingface")
        assert sorted(file.name for file in path.iterdir()) == [
            "README.md", "config.json", "model.safetensors"
        ]  # fmt: skip
        other = tmp_path / "photos"
        other.mkdir()
        (other / "cat.jpg").write_bytes(b"")
        with pytest.raises(ConfigError, match="holds files that are not an export"):
            export(open_exportable(folder), "huggingface", other, ExportConfig())
        assert (other / "cat.jpg").exists()


def run_offline(script: str, folder: Path) -> None:
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "2",
    }
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_script_in_the_documents_loads_the_encoder_without_raysl(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "import_and_export.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    folder = write_at(tmp_path / "runs" / "quickstart", RESNET)
    torch.save(images(), tmp_path / "images.pt")
    after = "\nwith torch.no_grad():\n    torch.save(model(torch.load('images.pt')), 'out.pt')\n"
    after += "import sys; assert 'raysl' not in sys.modules\n"
    run_offline(block[1] + after, tmp_path)
    with torch.no_grad():
        expected = load_encoder(folder)(images())
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-5, atol=1e-5)


def write_at(folder: Path, section: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    return write(folder, section)


class TestRefused:
    @pytest.mark.parametrize(
        ("section", "format_name", "text"),
        [
            (
                FOREIGN,
                "torchvision",
                "neither .* width=0.125 and selective kernels; use --format onnx",
            ),
            ({"name": "resnet18", "norm": "none"}, "timm", "resnet18 with norm=none"),
            (VIT, "torchvision", "torchvision has no vit_tiny .*use --format timm"),
            (CIFAR, "huggingface", "stem cifar; use --format torchvision"),
            (NORMED | {"norm_eps": 1e-12}, "timm", "vit_tiny with norm_eps=1e-12; use --format on"),
            ({"name": "torchvision:mobilenet_v3_small"}, "timm", "use --format torchvision"),
        ],
    )
    def test_what_a_format_cannot_hold(
        self, tmp_path: Path, section: dict[str, Any], format_name: str, text: str
    ) -> None:
        pytest.importorskip("timm")
        folder = write(tmp_path, section)
        with pytest.raises(ConfigError, match=f"--format {format_name}: .*{text}"):
            exported(folder, format_name)
        assert not list((folder / "exports").iterdir())

    @pytest.mark.parametrize(
        ("package", "format_name", "extra"),
        [("onnx", "onnx", "onnx"), ("onnxruntime", "onnx", "onnx"), ("timm", "timm", "timm")],
    )
    def test_a_package_that_is_missing(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        package: str,
        format_name: str,
        extra: str,
    ) -> None:
        folder = write(tmp_path, FOREIGN if format_name == "onnx" else VIT)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"not installed; pip install raysl\[{extra}\]"):
            exported(folder, format_name)

    def test_a_copy_that_differs_is_not_kept(self, tmp_path: Path) -> None:
        folder = write(tmp_path, FOREIGN)
        kept = exported(folder, "torchscript").path
        before = kept.read_bytes()
        with pytest.raises(
            ExportError, match=r"differs by .*more than tolerance=1e-30.*nothing was"
        ):
            exported(folder, "torchscript", tolerance=1e-30)
        assert kept.read_bytes() == before
        assert [file.name for file in kept.parent.iterdir()] == [kept.name]

    def test_a_full_disk_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write(tmp_path, FOREIGN)
        kept = exported(folder, "torchscript").path
        before = kept.read_bytes()

        def full(_: object, file: Path) -> None:
            Path(file).write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(torch.jit, "save", full)
        with pytest.raises(OSError, match="No space left"):
            exported(folder, "torchscript")
        assert kept.read_bytes() == before
        assert [file.name for file in kept.parent.iterdir()] == [kept.name]

    def test_what_is_no_encoder(self, tmp_path: Path) -> None:
        (tmp_path / "encoder.safetensors").write_bytes(b"")
        with pytest.raises(DataError, match="not a safetensors file"):
            open_exportable(tmp_path)
