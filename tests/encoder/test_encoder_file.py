import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raysl.encoder.file import load_encoder, load_weights, read_description, save_encoder
from raysl.errors import DataError
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.batchnorm import set_batch_norm_scope

DESCRIPTION = {
    "backbone": {"name": "resnet18", "stem": "cifar", "width": 0.125},
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
    "image_size_px": 32,
}


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18", stem="cifar", width=0.125))
    with torch.no_grad():
        backbone(torch.randn(4, 3, 16, 16))  # so that the running statistics are not 0 and 1
    return backbone.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_what_is_loaded_gives_the_same_features(tmp_path: Path, backbone: Backbone) -> None:
    save_encoder(tmp_path / "encoder.safetensors", backbone, description=DESCRIPTION)
    expected = backbone(images())
    for where in (tmp_path / "encoder.safetensors", tmp_path, str(tmp_path)):
        loaded = load_encoder(where)
        assert not loaded.training
        assert torch.equal(loaded(images()), expected)


def test_the_header_tells_how_to_use_it(tmp_path: Path, backbone: Backbone) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, backbone, description=DESCRIPTION)
    assert read_description(path) == DESCRIPTION | {"embed_dim": 64}
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.safetensors"]


@torch.no_grad()
def test_the_file_loads_strictly_into_plain_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18")).eval()
    description = DESCRIPTION | {"backbone": {"name": "resnet18"}}
    save_encoder(tmp_path / "e.safetensors", backbone, description=description)
    plain = torchvision.models.resnet18(weights=None)
    plain.fc = nn.Identity()
    plain.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    torch.testing.assert_close(plain.eval()(images()), backbone(images()))


@pytest.mark.parametrize("scope", ["sync", "split"])
@torch.no_grad()
def test_batch_norm_over_workers_or_splits_leaves_a_plain_encoder(
    tmp_path: Path, backbone: Backbone, scope: Any
) -> None:
    set_batch_norm_scope(backbone, scope, num_splits=2)
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_encoder(tmp_path / "encoder.safetensors", backbone, description=DESCRIPTION)
    torch.testing.assert_close(load_encoder(tmp_path)(images()), backbone(images()))


@pytest.mark.parametrize(
    "section",
    [
        {"name": "resnet18", "width": 0.25, "selective_kernels": True, "norm": "group"},
        {"name": "resnet18", "width": 0.25, "stem": "small", "norm": "none"},
        {"name": "vit_tiny", "patch_size_px": 4, "depth": 1, "pool": "mean"},
        {"name": "vit_tiny", "patch_size_px": 8, "depth": 1, "positions": "sincos"},
        {"name": "torchvision:mnasnet0_5"},
        {"name": "torchvision:squeezenet1_1"},
        {"name": "timm:vit_tiny_patch16_224"},
    ],
    ids=lambda section: "-".join(map(str, section.values())),
)
@torch.no_grad()
def test_every_kind_of_backbone_comes_back(tmp_path: Path, section: dict[str, Any]) -> None:
    if section["name"].startswith("timm:"):
        pytest.importorskip("timm")
    config = BackboneConfig(**section, weights="elsewhere/encoder.safetensors")
    backbone = build_backbone(config, image_size_px=32)
    description = DESCRIPTION | {"backbone": config.model_dump(mode="json")}
    save_encoder(tmp_path / "encoder.safetensors", backbone, description=description)
    assert "weights" not in read_description(tmp_path / "encoder.safetensors")["backbone"]
    loaded = load_encoder(tmp_path)
    given = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(given), backbone.eval()(given))


@torch.no_grad()
def test_a_file_of_raysl_0_1_still_loads(tmp_path: Path) -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", stem="cifar")).eval()
    older = {key: value for key, value in DESCRIPTION.items() if key != "backbone"}
    older |= {"name": "resnet18", "stem": "cifar"}
    save_encoder(tmp_path / "encoder.safetensors", backbone, description=older)
    assert torch.equal(load_encoder(tmp_path)(images()), backbone(images()))


def test_loading_takes_nothing_from_the_global_generator(
    tmp_path: Path, backbone: Backbone
) -> None:
    save_encoder(tmp_path / "encoder.safetensors", backbone, description=DESCRIPTION)
    before = torch.get_rng_state()
    load_encoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_older_file_stays_until_the_new_one_is_complete(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, backbone, description=DESCRIPTION)

    def full(file: Path, data: bytes) -> int:
        with open(file, "wb") as opened:
            opened.write(data[: len(data) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_encoder(path, backbone, description=DESCRIPTION | {"mean": [0, 0, 0]})
    assert read_description(path)["mean"] == DESCRIPTION["mean"]


def test_a_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path, backbone: Backbone) -> None:
    path = tmp_path / "encoder.safetensors"
    before = os.umask(0o022)
    try:
        save_encoder(path, backbone, description=DESCRIPTION)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


class TestRefused:
    def test_a_pickle_and_its_code_is_not_run(self, tmp_path: Path) -> None:
        path, trace = tmp_path / "encoder.safetensors", tmp_path / "trace"
        path.write_bytes(pickle.dumps(_Malicious(f"touch {trace}")))
        with pytest.raises(DataError, match="not a safetensors file"):
            load_encoder(path)
        assert not trace.exists()

    def test_a_torch_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "resnet18.pth"
        torch.save({"conv1.weight": torch.zeros(2)}, path)
        with pytest.raises(DataError, match=rf"^{path}: not a safetensors file"):
            load_encoder(path)

    @pytest.mark.parametrize("kept", [0, 4, 1000, -10])
    def test_a_file_that_was_cut_short(self, tmp_path: Path, backbone: Backbone, kept: int) -> None:
        path = tmp_path / "encoder.safetensors"
        save_encoder(path, backbone, description=DESCRIPTION)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(DataError, match="not a safetensors file"):
            load_encoder(path)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"encoder\.safetensors: no such file or folder; give "):
            load_encoder(tmp_path)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_weights_of_someone_else(self, tmp_path: Path, metadata: dict[str, str] | None) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(DataError, match="safetensors, but not an encoder that raysl wrote"):
            load_encoder(path)

    def test_weights_that_do_not_fit_what_the_header_says(
        self, tmp_path: Path, backbone: Backbone
    ) -> None:
        path = tmp_path / "encoder.safetensors"
        save_encoder(path, backbone, description=DESCRIPTION | {"backbone": {"name": "resnet18"}})
        with pytest.raises(DataError, match="its weights do not fit resnet18: ") as caught:
            load_encoder(path)
        assert "conv1.weight" in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"backbone": {"name": "resnet18", "stem": "new"}}, "describes no encoder .*stem"),
            ({"backbone": {"name": "resnet18", "newer": 1}}, "describes no encoder .*newer"),
            ({"backbone": {"name": "resnet1000000"}}, "describes no encoder .*is not known"),
            ({"backbone": {"name": "resnet18", "width": 1e6}}, "describes no encoder .*width"),
            ({"image_size_px": "32"}, "image_size_px='32', not a positive integer"),
        ],
    )
    def test_a_header_that_describes_nothing_we_know(
        self, tmp_path: Path, backbone: Backbone, changes: dict[str, Any], text: str
    ) -> None:
        path = tmp_path / "encoder.safetensors"
        save_encoder(path, backbone, description=DESCRIPTION | changes)
        with pytest.raises(DataError, match=rf"^{path}: .*{text}"):
            load_encoder(path)

    @pytest.mark.parametrize("header", ["{", "[1]", None])
    def test_a_header_that_is_damaged(self, tmp_path: Path, header: str | None) -> None:
        path = tmp_path / "encoder.safetensors"
        metadata = {"format": "raysl-encoder-1"} | ({} if header is None else {"raysl": header})
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(DataError, match="an encoder of raysl with a damaged header"):
            load_encoder(path)


CONFIG = BackboneConfig(name="resnet18", stem="small", width=0.125)


def build(seed: int, config: BackboneConfig = CONFIG) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone(config, image_size_px=32)


def weights(seed: int = 1) -> dict[str, Tensor]:
    return build(seed).net.state_dict()


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def assert_loaded(backbone: Backbone, expected: dict[str, Tensor]) -> None:
    state = backbone.net.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


class TestWeightsOfRaysl:
    @pytest.mark.parametrize("name", [".", "encoder.safetensors"])
    def test_fill_the_backbone(self, tmp_path: Path, name: str) -> None:
        description = {"backbone": CONFIG.model_dump(mode="json"), "image_size_px": 32}
        save_encoder(tmp_path / "encoder.safetensors", build(1), description=description)
        backbone = build(2)
        load_weights(backbone, tmp_path / name)
        assert_loaded(backbone, weights(1))

    def test_of_a_vision_transformer(self, tmp_path: Path) -> None:
        config = BackboneConfig(name="vit_tiny", patch_size_px=8, depth=1)
        save_encoder(tmp_path / "encoder.safetensors", build(1, config), description={})
        backbone = build(2, config)
        load_weights(backbone, tmp_path)
        assert_loaded(backbone, build(1, config).net.state_dict())

    @pytest.mark.parametrize("pool", ["cls", "mean"])
    def test_of_a_vision_transformer_whose_mean_is_to_be_normed(
        self, tmp_path: Path, pool: str
    ) -> None:
        """As MAE's main_finetune.py:252: all but the norm of the mean, which begins anew."""
        given = {"name": "vit_tiny", "patch_size_px": 8, "depth": 1}
        theirs = build(1, BackboneConfig.model_validate(given | {"pool": pool}))
        with torch.no_grad():
            theirs.net.norm.weight.fill_(3.0)  # type: ignore[union-attr, operator]
        save_encoder(tmp_path / "encoder.safetensors", theirs, description={})
        backbone = build(2, BackboneConfig.model_validate(given | {"pool": "mean_norm"}))
        load_weights(backbone, tmp_path)
        expected = theirs.net.state_dict()
        assert (expected.pop("norm.weight") == 3).all()
        del expected["norm.bias"]
        new = {"fc_norm.weight": torch.ones(192), "fc_norm.bias": torch.zeros(192)}
        assert_loaded(backbone, expected | new)

    def test_of_a_normed_mean_are_taken_as_they_are(self, tmp_path: Path) -> None:
        config = BackboneConfig(name="vit_tiny", patch_size_px=8, depth=1, pool="mean_norm")
        theirs = build(1, config)
        with torch.no_grad():
            theirs.net.fc_norm.weight.fill_(3.0)  # type: ignore[union-attr, operator]
        save_encoder(tmp_path / "encoder.safetensors", theirs, description={})
        backbone = build(2, config)
        load_weights(backbone, tmp_path)
        assert_loaded(backbone, theirs.net.state_dict())


HEAD = {"head.weight": torch.zeros(2, 2)}
CLASSIFIER = {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}


class TestWeightsOfOthers:
    @pytest.mark.parametrize(
        "content",
        [
            weights() | CLASSIFIER,
            {"state_dict": behind("module.", weights() | CLASSIFIER), "epoch": 3},
            {"model": weights() | HEAD, "args": argparse.Namespace(lr=0.1)},
            {"teacher": behind("backbone.", weights()) | HEAD, "student": {}},
            {"teacher": behind("module.backbone.", weights()) | behind("module.", HEAD)},
            {
                "state_dict": behind("module.encoder_q.", weights())
                | {"module.queue": torch.ones(2)}
            },
            {"state_dict": behind("module.base_encoder.", weights())},
            behind("net.", weights()) | {"projector.0.weight": torch.ones(2)},
            {name: value.double() for name, value in weights().items()},
        ],
        ids=["plain", "parallel", "mae", "dino", "dino-parallel", "moco", "moco-v3", "net", "64"],
    )
    def test_fill_the_backbone(self, tmp_path: Path, content: dict[str, Any]) -> None:
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        backbone = build(2)
        load_weights(backbone, path)
        assert_loaded(backbone, weights(1))

    def test_in_safetensors(self, tmp_path: Path) -> None:
        save_file(weights() | CLASSIFIER, tmp_path / "model.safetensors")
        backbone = build(2)
        load_weights(backbone, str(tmp_path / "model.safetensors"))
        assert_loaded(backbone, weights(1))

    def test_may_lack_the_count_of_batches(self, tmp_path: Path) -> None:
        state = {key: v for key, v in weights().items() if "num_batches" not in key}
        torch.save(state, tmp_path / "old.pt")
        backbone = build(2)
        load_weights(backbone, tmp_path / "old.pt")
        assert_loaded(backbone, weights(1))

    def test_of_a_network_whose_own_names_look_like_a_prefix(self, tmp_path: Path) -> None:
        net = nn.Module()
        net.encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # type: ignore[assignment]
        state = {name: torch.full_like(value, 3) for name, value in net.state_dict().items()}
        torch.save({"model": behind("encoder.", state)}, tmp_path / "w.pt")
        load_weights(Backbone(net, embed_dim=2), tmp_path / "w.pt")
        assert all((value == 3).all() for value in net.state_dict().values())


class TestWeightsRefused:
    def refused(self, path: Path, text: str, config: BackboneConfig = CONFIG) -> None:
        backbone = build(2, config)
        before = {name: value.clone() for name, value in backbone.net.state_dict().items()}
        with pytest.raises(DataError, match=rf"^{path}: {text}"):
            load_weights(backbone, path)
        assert_loaded(backbone, before)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_pickle_and_its_code_is_not_run(self, tmp_path: Path, legacy: bool) -> None:
        path, trace = tmp_path / "w.pth", tmp_path / "trace"
        content = {"state_dict": weights(), "extra": _Malicious(f"touch {trace}")}
        if legacy:
            path.write_bytes(pickle.dumps(content["extra"]))
        else:
            torch.save(content, path)
        self.refused(path, "it tries to run code when loaded")
        assert not trace.exists()

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none.pth", "no such file; give a run folder or a file of weights")

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    @pytest.mark.parametrize("kept", [0, 5, 2000, -100])
    def test_a_file_that_was_cut_short(self, tmp_path: Path, name: str, kept: int) -> None:
        path = tmp_path / name
        if path.suffix == ".pth":
            torch.save(weights(), path)
        else:
            save_file(weights(), path)
        path.write_bytes(path.read_bytes()[:kept])
        self.refused(
            path, "(the file is empty|not a safetensors file|cannot be read as a file of wei)"
        )

    @pytest.mark.parametrize(("content", "kind"), [([1], "list"), (torch.ones(2), "Tensor")])
    def test_what_is_no_state_dict(self, tmp_path: Path, content: Any, kind: str) -> None:
        torch.save(content, tmp_path / "w.pt")
        self.refused(tmp_path / "w.pt", f"holds a {kind}, not a state dict")

    def test_another_network_naming_the_first_misfits(self, tmp_path: Path) -> None:
        torch.save(weights(), tmp_path / "w.pt")
        deep = BackboneConfig(name="resnet34", stem="small", width=0.125)
        text = r".* missing: layer1\.2\.conv1\.weight, .* and \d+ more"
        self.refused(tmp_path / "w.pt", text, deep)
        vit = BackboneConfig(name="vit_tiny", patch_size_px=8, depth=1)
        self.refused(
            tmp_path / "w.pt", r".* missing: cls_token, .*; unexpected: conv1\.weight", vit
        )

    def test_tensors_of_another_shape(self, tmp_path: Path) -> None:
        torch.save(weights() | {"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "w.pt")
        text = r".* of another shape: conv1\.weight \(8, 3, 7, 7\) for \(8, 3, 3, 3\)$"
        self.refused(tmp_path / "w.pt", text)

    def test_a_value_that_is_not_a_tensor_is_missing(self, tmp_path: Path) -> None:
        torch.save(weights() | {"conv1.weight": 3}, tmp_path / "w.pt")
        self.refused(tmp_path / "w.pt", r".* missing: conv1\.weight$")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, tmp_path: Path, value: float) -> None:
        state = weights()
        state["bn1.bias"][3] = value
        torch.save(state, tmp_path / "w.pt")
        self.refused(tmp_path / "w.pt", r"its weights are not all finite: bn1\.bias")
