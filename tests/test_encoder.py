import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from raysl.encoder import load_encoder, read_description, save_encoder
from raysl.errors import DataError
from raysl.nn.backbones import Backbone, build_backbone
from raysl.nn.batchnorm import set_batch_norm_scope

DESCRIPTION = {
    "name": "resnet18",
    "stem": "cifar",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
    "image_size_px": 32,
}


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", stem="cifar")
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
    assert read_description(path) == DESCRIPTION | {"embed_dim": 512}
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.safetensors"]


@torch.no_grad()
def test_the_file_loads_strictly_into_plain_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18").eval()
    description = DESCRIPTION | {"stem": "imagenet"}
    save_encoder(tmp_path / "e.safetensors", backbone, description=description)
    plain = torchvision.models.resnet18(weights=None)
    plain.fc = nn.Identity()
    plain.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    assert torch.equal(plain.eval()(images()), backbone(images()))


@pytest.mark.parametrize("scope", ["sync", "split"])
@torch.no_grad()
def test_batch_norm_over_workers_or_splits_leaves_a_plain_encoder(
    tmp_path: Path, backbone: Backbone, scope: Any
) -> None:
    set_batch_norm_scope(backbone, scope, num_splits=2)
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_encoder(tmp_path / "encoder.safetensors", backbone, description=DESCRIPTION)
    torch.testing.assert_close(load_encoder(tmp_path)(images()), backbone(images()))


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
        save_encoder(path, backbone, description=DESCRIPTION | {"name": "resnet50"})
    assert read_description(path)["name"] == "resnet18"


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
        with pytest.raises(DataError, match=r"encoder.safetensors: not a safetensors file: .*No"):
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
        save_encoder(path, backbone, description=DESCRIPTION | {"stem": "imagenet"})
        with pytest.raises(DataError, match="its weights do not fit resnet18: ") as caught:
            load_encoder(path)
        assert "conv1.weight" in str(caught.value)
