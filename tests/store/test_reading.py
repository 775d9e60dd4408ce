"""Encoders in a store are read like those on a disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.encoder.file import load_encoder, load_weights
from raysl.errors import DataError
from raysl.evaluate.embedding import encoder_digest
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.store.objects import Store
from raysl.store.reading import held_copy, local_copy


@pytest.fixture
def run(tiny_encoder: Callable[..., Path], bucket: str) -> tuple[str, Path]:
    """The address of a run folder in a store, and its encoder on the disk."""
    file = tiny_encoder()
    store = Store(f"{bucket}/runs/mine")
    store.put_file("encoder.safetensors", file)
    store.put("config.yaml", b"name: mine\n")
    store.put("checkpoints/step-000000001/state.pt", b"large")
    return store.address, file


def test_a_run_folder_and_its_file_are_read_by_their_addresses(run: tuple[str, Path]) -> None:
    address, file = run
    for place in (address, f"{address}/", f"{address}/encoder.safetensors"):
        copy = local_copy(place)
        encoder = copy if copy.is_file() else copy / "encoder.safetensors"
        assert encoder_digest(encoder) == encoder_digest(file)
    load_encoder(address)
    backbone = build_backbone(BackboneConfig(name="resnet18", width=0.125), image_size_px=16)
    load_weights(backbone, address)


def test_only_what_a_reader_needs_is_copied_and_once(run: tuple[str, Path]) -> None:
    copy = local_copy(run[0])
    assert copy.name == "mine"
    assert {path.name for path in copy.rglob("*")} == {"encoder.safetensors", "config.yaml"}
    assert local_copy(run[0]) == copy


@pytest.mark.parametrize("name", ["nowhere", "nowhere/encoder.safetensors", "mine/other.pth"])
def test_a_place_without_an_encoder_is_named(name: str, run: tuple[str, Path]) -> None:
    address = f"{run[0].rpartition('/')[0]}/{name}"
    with pytest.raises(DataError, match="give the address of a run folder") as caught:
        local_copy(address)
    assert address.rpartition("/")[0] in str(caught.value)


def test_a_path_is_returned_as_it_is() -> None:
    assert local_copy("some/run") == Path("some/run")
    assert local_copy(Path("/some/run")) == Path("/some/run")


def test_a_folder_that_was_replaced_is_copied_again(
    run: tuple[str, Path], tiny_encoder: Callable[..., Path]
) -> None:
    address, file = run
    before = encoder_digest(local_copy(address) / "encoder.safetensors")
    # Of another size too: a store tells the time of a change in whole seconds.
    another = tiny_encoder("another", seed=1, run="the same run with --fresh, and a longer name")
    Store(address).put_file("encoder.safetensors", another)
    copied = encoder_digest(local_copy(address) / "encoder.safetensors")
    assert copied != before == encoder_digest(file)


def test_a_folder_that_this_process_works_on_is_read_from_its_copy(
    run: tuple[str, Path], tmp_path: Path
) -> None:
    address, file = run
    with held_copy(address, file.parent):
        assert local_copy(address) == file.parent
        assert local_copy(f"{address}/encoder.safetensors") == file
    assert local_copy(address) != file.parent


def test_settings_are_read_with_those_beside_them(bucket: str) -> None:
    store = Store(f"{bucket}/sweep")
    store.put("best.yaml", b"extends: base.yaml\n")
    store.put("base.yaml", b"{}\n")
    store.put("large.safetensors", b"large")
    copy = local_copy(f"{store.address}/best.yaml")
    assert copy.read_text() == "extends: base.yaml\n"
    assert sorted(path.name for path in copy.parent.iterdir()) == ["base.yaml", "best.yaml"]
