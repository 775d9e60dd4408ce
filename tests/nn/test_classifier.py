import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import raysl
from raysl.errors import ConfigError, DataError
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.classifier import Classifier, load_classifier, load_head, save_classifier, save_head
from raysl.nn.heads import projection_mlp

CLASSES = ["cat", "dog", "cow"]
RESNET: dict[str, Any] = {"name": "resnet18", "stem": "small", "width": 0.125}
SECTIONS: dict[str, dict[str, Any]] = {
    "resnet": RESNET,
    "vit": {"name": "vit_tiny", "patch_size_px": 16, "depth": 1},
    "torchvision": {"name": "torchvision:squeezenet1_1"},
}
Write = Callable[..., Path]


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def classifier(section: dict[str, Any] = RESNET, head: nn.Sequential | None = None) -> Classifier:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(**section), image_size_px=32)
    model = Classifier(backbone, nn.Sequential() if head is None else head, CLASSES)
    nn.init.normal_(model.linear.weight)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))  # so that the running statistics are not 0 and 1
    return model.eval().requires_grad_(False)


def about(section: dict[str, Any] = RESNET) -> dict[str, Any]:
    backbone = BackboneConfig(**section, weights="elsewhere").model_dump(mode="json")
    return {"backbone": backbone, "image_size_px": 32, "mean": [0.4, 0.5, 0.6]}


def kept_head(width: int = 64) -> nn.Sequential:
    torch.manual_seed(3)
    return projection_mlp(width, 7, 5, num_layers=3)[:3]


class TestClassifierFile:
    @pytest.mark.parametrize("kind", SECTIONS)
    @pytest.mark.parametrize("with_head", [False, True])
    def test_what_is_loaded_gives_the_same_logits_and_names(
        self, tmp_path: Path, kind: str, with_head: bool
    ) -> None:
        section = SECTIONS[kind]
        width = build_backbone(BackboneConfig(**section), image_size_px=32).embed_dim
        model = classifier(section, kept_head(width) if with_head else None)
        path = tmp_path / "classifier.safetensors"
        save_classifier(path, model, description=about(section))
        expected = model(images())
        for where in (path, tmp_path, str(tmp_path)):
            loaded = load_classifier(where)
            assert torch.equal(loaded(images()), expected)
            assert loaded.class_names == CLASSES
            assert not any(module.training for module in loaded.modules())
        assert [file.name for file in tmp_path.iterdir()] == ["classifier.safetensors"]

    def test_the_package_loads_it(self, tmp_path: Path) -> None:
        model = classifier()
        save_classifier(tmp_path / "classifier.safetensors", model, description=about())
        assert torch.equal(raysl.load_classifier(tmp_path)(images()), model(images()))

    def test_the_header_tells_what_is_worth_knowing_but_not_where_weights_came_from(
        self, tmp_path: Path
    ) -> None:
        save_classifier(tmp_path / "classifier.safetensors", classifier(), description=about())
        found = load_classifier(tmp_path).description
        assert (found["mean"], found["image_size_px"]) == ([0.4, 0.5, 0.6], 32)
        assert found["class_names"] == CLASSES
        assert "weights" not in found["backbone"]

    def test_plain_torchvision_loads_a_resnet_without_a_kept_head(self, tmp_path: Path) -> None:
        section = {"name": "resnet18"}
        model = classifier(section)
        path = tmp_path / "classifier.safetensors"
        save_classifier(path, model, description=about(section))
        plain = torchvision.models.resnet18(weights=None, num_classes=3)
        plain.load_state_dict(load_file(path), strict=True)
        torch.testing.assert_close(plain.eval()(images()), model(images()), rtol=1e-4, atol=1e-4)

    def test_timm_loads_a_vision_transformer_without_a_kept_head(
        self, tmp_path: Path, timm: Any
    ) -> None:
        model = classifier(SECTIONS["vit"])
        path = tmp_path / "classifier.safetensors"
        save_classifier(path, model, description=about(SECTIONS["vit"]))
        plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
        plain.load_state_dict(load_file(path), strict=True)
        torch.testing.assert_close(plain.eval()(images()), model(images()), rtol=1e-4, atol=1e-4)

    def test_a_kept_head_lies_under_names_of_its_own(self, tmp_path: Path) -> None:
        path = tmp_path / "classifier.safetensors"
        save_classifier(path, classifier(head=kept_head()), description=about())
        names = {name for name in load_file(path) if name.startswith("projection_head.")}
        assert names == {f"projection_head.{name}" for name in kept_head().state_dict()}

    def test_loading_takes_nothing_from_the_global_generator(self, tmp_path: Path) -> None:
        save_classifier(tmp_path / "classifier.safetensors", classifier(), description=about())
        before = torch.get_rng_state()
        load_classifier(tmp_path)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "classifier.safetensors"
    save_classifier(path, classifier(head=kept_head()), description=about())
    return path


@pytest.fixture
def changed(good: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the good file again with another header, or other tensors."""

    def write(
        header: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None
    ) -> Path:
        with safe_open(good, framework="pt") as file:
            metadata = dict(file.metadata())
        known = json.loads(metadata["raysl"]) | (header or {})
        state = load_file(good) | (tensors or {})
        path = tmp_path / "classifier.safetensors"
        kept = {name: value for name, value in state.items() if value is not None}
        save_file(kept, path, metadata=metadata | {"raysl": json.dumps(known)})
        return path

    return write


class TestBadClassifierFile:
    def test_unchanged_it_loads(self, changed: Write) -> None:
        assert load_classifier(changed()).class_names == CLASSES

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ({"class_names": []}, "names no classes"),
            ({"class_names": "cat"}, "names no classes"),
            ({"class_names": ["cat", 1, "cow"]}, "names no classes"),
            ({"class_names": ["cat", "dog"]}, "its weights do not fit"),
            ({"image_size_px": 0}, "image_size_px=0, not a positive integer"),
            ({"image_size_px": "32"}, "image_size_px='32', not a positive integer"),
            ({"backbone": None}, "describes no encoder"),
            ({"backbone": {"name": "resnet19"}}, "describes no encoder"),
            ({"backbone": RESNET | {"width": 0.25}}, "a layer of 64 features after 128"),
            ({"backbone": RESNET | {"stem": "imagenet"}}, "its weights do not fit"),
            ({"classifier": "layer4"}, "its weights do not fit"),
            ({"classifier": None}, "its weights do not fit"),
            ({"head": []}, "its weights do not fit"),
            ({"head": 5}, "describes no head"),
            ({"head": "relu"}, "describes no head"),
            ({"head": [{"layer": "exec"}]}, "a layer 'exec'"),
            ({"head": [{"layer": "linear", "inputs": 1 << 40, "outputs": 2}]}, "1099511627776"),
            ({"head": [{"layer": "linear", "inputs": -1, "outputs": 2}]}, "-1 features"),
        ],
        ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
    )
    def test_a_header_that_describes_something_else(
        self, changed: Write, header: dict[str, Any], message: str
    ) -> None:
        path = changed(header)
        with pytest.raises(DataError, match=message) as caught:
            load_classifier(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"fc.bias": None}, "its weights do not fit"),
            ({"fc.weight": torch.zeros(3, 8)}, "its weights do not fit"),
            ({"conv1.weight": None}, "its weights do not fit"),
            ({"extra": torch.zeros(1)}, "its weights do not fit"),
            ({"projection_head.0.weight": None}, "its weights do not fit"),
            ({"fc.bias": torch.tensor([0.0, torch.nan, 0.0])}, "not all finite: fc.bias"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_tensors_that_do_not_fit(
        self, changed: Write, tensors: dict[str, Tensor | None], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            load_classifier(changed(tensors=tensors))

    @pytest.mark.parametrize("keep", [0, 4, 200, 0.5])
    def test_a_file_that_was_cut_off(self, good: Path, tmp_path: Path, keep: float) -> None:
        path = tmp_path / "classifier.safetensors"
        content = good.read_bytes()
        path.write_bytes(content[: int(keep if keep != 0.5 else len(content) / 2)])
        with pytest.raises(DataError, match="not a safetensors file"):
            load_classifier(path)

    def test_pickled_code_is_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (tmp_path / "sprung",)

        path = tmp_path / "classifier.safetensors"
        path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(DataError, match="not a safetensors file"):
            load_classifier(path)
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000])
    def test_a_damaged_header(self, good: Path, tmp_path: Path, text: str) -> None:
        path = tmp_path / "classifier.safetensors"
        with safe_open(good, framework="pt") as file:
            metadata = file.metadata() | {"raysl": text}
        save_file(load_file(good), path, metadata=metadata)
        with pytest.raises(DataError, match="with a damaged header"):
            load_classifier(path)

    def test_a_size_that_no_memory_holds(self, tmp_path: Path) -> None:
        section = SECTIONS["vit"]
        path = tmp_path / "classifier.safetensors"
        description = about(section) | {"image_size_px": 16 << 30}
        save_classifier(path, classifier(section), description=description)
        with pytest.raises(
            DataError, match=r"classifier\.safetensors: .*image_size_px=17179869184"
        ):
            load_classifier(path)

    def test_a_size_that_the_encoder_cannot_take(self, tmp_path: Path) -> None:
        section = SECTIONS["vit"]
        path = tmp_path / "classifier.safetensors"
        save_classifier(
            path, classifier(section), description=about(section) | {"image_size_px": 30}
        )
        with pytest.raises(
            ConfigError, match=r"classifier\.safetensors: .*patch_size_px=16 does n"
        ):
            load_classifier(path)

    def test_nothing_there_and_another_kind_of_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"classifier\.safetensors: no such file; it should be"):
            load_classifier(tmp_path)
        path = tmp_path / "projection_head.safetensors"
        save_head(path, kept_head(), description={})
        with pytest.raises(DataError, match="safetensors, but not the classifier of a fine-tuned"):
            load_classifier(path)

    def test_a_head_that_does_not_go_on_the_encoder(self, tmp_path: Path) -> None:
        model = classifier()
        model.head = projection_mlp(63, 64, 64)[:3]  # the encoder has 64 features
        save_classifier(tmp_path / "classifier.safetensors", model, description=about())
        with pytest.raises(DataError, match="a layer of 63 features after 64"):
            load_classifier(tmp_path)


class TestHeadFile:
    @pytest.mark.parametrize(
        "settings", [{}, {"last_norm": "none"}, {"batch_norm": False}, {"num_layers": 1}]
    )
    @torch.no_grad()
    def test_what_is_loaded_gives_the_same_projections(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        torch.manual_seed(0)
        head = projection_mlp(6, 7, 5, **{"num_layers": 3} | settings)
        features = torch.randn(16, 6) + 1
        head(features)  # so that the running statistics are not 0 and 1
        path = tmp_path / "projection_head.safetensors"
        save_head(path, head, description={"run": "a-run"})
        for where in (path, tmp_path, str(tmp_path)):
            assert torch.equal(load_head(where).eval()(features), head.eval()(features))

    def test_layers_without_a_name_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="a head with a Dropout cannot be written"):
            save_head(tmp_path / "h.safetensors", nn.Sequential(nn.Dropout()), description={})
        assert not list(tmp_path.iterdir())

    def test_a_classifier_is_not_a_head(self, good: Path) -> None:
        with pytest.raises(DataError, match="safetensors, but not the projection head of a pretr"):
            load_head(good)

    @pytest.mark.parametrize("layers", [7, [{}], [{"layer": "linear"}], ["linear"]])
    def test_a_header_that_describes_no_head(self, tmp_path: Path, layers: Any) -> None:
        path = tmp_path / "projection_head.safetensors"
        save_head(path, kept_head(), description={})
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() | {"raysl": json.dumps({"layers": layers})}
        save_file(load_file(path), path, metadata=metadata)
        with pytest.raises(DataError, match=r"projection_head\.safetensors: its header describes"):
            load_head(path)
