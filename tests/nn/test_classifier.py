import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import raysl
from raysl.errors import ConfigError, DataError
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.classifier import Classifier, load_classifier, load_head, save_classifier, save_head
from raysl.nn.heads import projection_mlp

NAMES = ["ant", "bee", "cat"]
SMALL = {"name": "resnet18", "stem": "small", "width": 0.125}


def made(backbone: dict[str, Any], *, head_layers: int = 0, size_px: int = 32) -> Classifier:
    torch.manual_seed(0)
    encoder = build_backbone(BackboneConfig(**backbone), image_size_px=size_px)
    head = nn.Sequential()
    if head_layers:
        head = projection_mlp(encoder.embed_dim, 7, 5, num_layers=head_layers)
    model = Classifier(encoder, head, NAMES)
    nn.init.normal_(model.linear.weight)
    for module in model.modules():  # so that evaluation mode is told from training
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean)
    return model.eval()


def written(path: Path, model: Classifier, backbone: dict[str, Any], size_px: int = 32) -> Path:
    about = {"backbone": backbone | {"weights": "/some/where"}, "image_size_px": size_px}
    save_classifier(path, model, description=about | {"mean": [0.5] * 3, "std": [0.2] * 3})
    return path


class TestFile:
    @pytest.mark.parametrize("layers", [0, 1, 3])
    def test_gives_the_same_logits_again(self, tmp_path: Path, layers: int) -> None:
        model = made(SMALL, head_layers=layers)
        path = written(tmp_path / "classifier.safetensors", model, SMALL)
        images = torch.randn(2, 3, 32, 32)
        for given in (path, tmp_path, str(tmp_path)):
            again = load_classifier(given)
            assert again.class_names == NAMES
            assert not again.training
            assert again.description["backbone"].get("weights") is None
            torch.testing.assert_close(again(images), model(images))
        assert raysl.load_classifier is load_classifier

    @pytest.mark.parametrize(
        "name", ["resnet18", "convnext_tiny", "torchvision:mobilenet_v3_small"]
    )
    def test_loads_into_plain_torchvision(self, tmp_path: Path, name: str) -> None:
        models = pytest.importorskip("torchvision.models")
        backbone = {"name": name}
        model = made(backbone, size_px=64)
        path = written(tmp_path / "classifier.safetensors", model, backbone, 64)
        plain = models.get_model(name.rpartition(":")[2], weights=None, num_classes=3).eval()
        plain.load_state_dict(load_file(path))
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "theirs"),
        [("vit_tiny", "vit_tiny_patch16_224"), ("timm:resnet10t", "resnet10t")],
    )
    def test_loads_into_plain_timm(self, tmp_path: Path, name: str, theirs: str) -> None:
        timm = pytest.importorskip("timm")
        backbone: dict[str, Any] = {"name": name}
        model = made(backbone, size_px=32)
        path = written(tmp_path / "classifier.safetensors", model, backbone, 32)
        size = {"img_size": 32} if name.startswith("vit") else {}
        plain = timm.create_model(theirs, num_classes=3, **size).eval()
        plain.load_state_dict(load_file(path))
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)

    def test_the_old_file_stays_where_a_new_one_cannot_be_written(self, tmp_path: Path) -> None:
        model = made(SMALL)
        path = written(tmp_path / "classifier.safetensors", model, SMALL)
        before = path.read_bytes()
        model.head = nn.Sequential(nn.Tanh())
        with pytest.raises(ConfigError, match="a head with a Tanh cannot be written"):
            written(path, model, SMALL)
        assert path.read_bytes() == before


class TestHeadFile:
    @pytest.mark.parametrize("last_norm", ["scaled", "plain", "none"])
    def test_gives_the_same_outputs_again(self, tmp_path: Path, last_norm: Any) -> None:
        torch.manual_seed(0)
        head = projection_mlp(6, 5, 4, num_layers=3, last_norm=last_norm).eval()
        save_head(tmp_path / "projection_head.safetensors", head, description={"run": "a"})
        features = torch.randn(8, 6)
        torch.testing.assert_close(load_head(tmp_path).eval()(features), head(features))


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code from the file was run')",)


class TestHostileFiles:
    @pytest.mark.parametrize("load", [load_classifier, load_head])
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (pickle.dumps(Attack()), "not a safetensors file"),
            (b"", "not a safetensors file"),
            (b"\xff" * 64, "not a safetensors file"),
        ],
    )
    def test_what_is_no_such_file_is_refused_and_not_run(
        self, tmp_path: Path, load: Any, content: bytes, message: str
    ) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load(path)

    def test_a_file_that_was_cut_short_is_refused(self, tmp_path: Path) -> None:
        path = written(tmp_path / "classifier.safetensors", made(SMALL), SMALL)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match="not a safetensors file"):
            load_classifier(path)

    def test_weights_alone_are_no_classifier(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        save_file({"fc.weight": torch.zeros(3, 4)}, path)
        with pytest.raises(DataError, match="safetensors, but not the classifier of a fine-tuned"):
            load_classifier(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"class_names": []}, "names no classes"),
            ({"class_names": [1, 2, 3]}, "names no classes"),
            ({"class_names": ["a", "b"]}, "its weights do not fit"),
            ({"image_size_px": -1}, "image_size_px=-1, not a positive integer"),
            ({"backbone": {"name": "resnet7"}}, "describes no encoder that this version"),
            ({"backbone": SMALL | {"width": 0.25}}, "its weights do not fit"),
            ({"head": [{"layer": "exec"}]}, "describes no head that this version knows"),
            (
                {"head": [{"layer": "linear", "inputs": 10**12, "outputs": 2, "bias": True}]},
                "describes no head that this version knows: 1000000000000 features",
            ),
        ],
    )
    def test_a_header_that_says_something_else_is_refused(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        path = written(tmp_path / "classifier.safetensors", made(SMALL), SMALL)
        description = load_classifier(path).description | change
        header = {"format": "raysl-classifier-1", "raysl": json.dumps(description)}
        save_file(load_file(path), path, metadata=header)
        with pytest.raises(DataError, match=message):
            load_classifier(path)

    def test_numbers_that_are_not_finite_are_refused(self, tmp_path: Path) -> None:
        model = made(SMALL)
        with torch.no_grad():
            model.linear.bias[1] = float("nan")
        path = written(tmp_path / "classifier.safetensors", model, SMALL)
        with pytest.raises(DataError, match=r"not all finite: fc\.bias"):
            load_classifier(path)
