"""Reading what torch.save writes, without running any of it."""

import argparse
import collections
import enum
import functools
import importlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raysl.encoder.read import read_content
from raysl.encoder.stored import StoredTensor
from raysl.errors import DataError

STATE = {
    "float": torch.randn(3, 5),
    "turned": torch.randn(4, 6).T[1:, ::2],
    "half": torch.randn(7).half(),
    "bfloat": torch.randn(2, 2).bfloat16(),
    "double": torch.randn(3).double(),
    "long": torch.arange(5),
    "byte": torch.arange(5, dtype=torch.uint8),
    "unsigned": torch.tensor([1, 60_000], dtype=torch.uint16),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 3),
    "parameter": nn.Parameter(torch.randn(2)),
}


def tensors(content: Any) -> dict[str, Tensor]:
    return {name: v.read() for name, v in content.items() if isinstance(v, StoredTensor)}


class Colour(enum.Enum):
    RED = 1


class Options(dict):  # type: ignore[type-arg]
    """A trainer's dictionary that one reads by attributes."""


class Logger:
    def __init__(self) -> None:
        self.lines = [1, 2]
        self.model = nn.Linear(2, 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return Logger, (), self.__dict__, iter(["a"]), iter([("b", 1)])

    def append(self, _: object) -> None: ...
    def extend(self, _: object) -> None: ...
    def __setitem__(self, *_: object) -> None: ...


@pytest.mark.parametrize("legacy", [False, True])
class TestWhatTorchSaves:
    def save(self, content: Any, path: Path, legacy: bool) -> Path:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path

    def test_gives_the_tensors_again(self, tmp_path: Path, legacy: bool) -> None:
        path = self.save(STATE, tmp_path / "w.pth", legacy)
        found = tensors(read_content(path))
        assert found.keys() == STATE.keys()
        for name, value in STATE.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value.detach()), name

    def test_finds_tensors_that_share_their_numbers(self, tmp_path: Path, legacy: bool) -> None:
        whole = torch.randn(10)
        state = {"whole": whole, "part": whole[3:7], "rows": whole.view(2, 5)[1]}
        found = tensors(read_content(self.save(state, tmp_path / "w.pth", legacy)))
        assert all(torch.equal(found[name], state[name]) for name in state)

    def test_passes_over_whatever_trainers_leave_beside(self, tmp_path: Path, legacy: bool) -> None:
        content = {
            "state_dict": collections.OrderedDict(weight=torch.ones(2)),
            "args": argparse.Namespace(lr=0.1, path=PurePosixPath("/data")),
            "options": Options(a=torch.zeros(1)),
            "colour": Colour.RED,
            "partial": functools.partial(Logger),
            "logger": Logger(),
            "module": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
            "array": np.arange(3),
            "number": np.float64(2),
            "generator": np.random.default_rng(0),
            "counts": collections.defaultdict(int, {"x": 1}),
            "device": torch.device("cpu"),
            "dtype": torch.float16,
            "set": {1, 2},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        }
        found = read_content(self.save(content, tmp_path / "w.ckpt", legacy))
        assert torch.equal(found["state_dict"]["weight"].read(), torch.ones(2))
        assert found.keys() == content.keys()

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
    def test_a_file_that_was_cut_short_is_refused(
        self, tmp_path: Path, legacy: bool, share: float
    ) -> None:
        path = self.save({"a": torch.randn(100, 100)}, tmp_path / "w.pth", legacy)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(DataError, match=rf"^{path}: cannot be read as a file of weights: "):
            read_content(path)

    def test_a_whole_module_is_refused_with_what_to_do(self, tmp_path: Path, legacy: bool) -> None:
        path = self.save(nn.Linear(2, 2), tmp_path / "w.pth", legacy)
        with pytest.raises(
            DataError, match=r"holds an object of class torch\.nn\..*Linear.*state_dict\(\)"
        ):
            read_content(path)


def test_no_module_of_the_file_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    thing = importlib.import_module("theirs").Thing()
    torch.save({"thing": thing, "w": torch.ones(1)}, tmp_path / "w.pth")
    del sys.modules["theirs"]
    assert float(read_content(tmp_path / "w.pth")["w"].read()) == 1
    assert "theirs" not in sys.modules


class Attack:
    def __init__(self, function: Any, *values: Any) -> None:
        self.call = function, values

    def __reduce__(self) -> Any:
        return self.call


class BuildAttack:
    """Sets an attribute of what a pickle names, instead of calling it."""

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (), {"__defaults__": (1,)}


class TestHostile:
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("function", ["system", "exec", "eval", "call", "open"])
    def test_code_is_not_run_and_the_file_is_refused(
        self, tmp_path: Path, legacy: bool, function: str, protocol: int
    ) -> None:
        path, trace = tmp_path / "w.pth", tmp_path / "trace"
        write = f"open({str(trace)!r}, 'w')"
        attack = {
            "system": Attack(os.system, f"touch {trace}"),
            "exec": Attack(exec, write),
            "eval": Attack(eval, write),
            "call": Attack(subprocess.call, ["touch", str(trace)]),
            "open": Attack(open, str(trace), "w"),
        }[function]
        content = {"state_dict": STATE, "extra": attack}
        torch.save(
            content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(DataError, match=r"tries to run code when loaded, by \w+\.\w+"):
            read_content(path)
        assert not trace.exists()

    def test_a_function_nobody_warned_of_is_not_called_either(self, tmp_path: Path) -> None:
        path, trace = tmp_path / "w.pth", tmp_path / "trace"
        content = {"w": torch.ones(1), "extra": Attack(Path.touch, trace)}
        torch.save(content, path)
        with pytest.raises(FileNotFoundError):
            trace.stat()
        assert torch.equal(read_content(path)["w"].read(), torch.ones(1))
        assert not trace.exists()

    def test_what_a_pickle_sets_does_not_stay(self, tmp_path: Path) -> None:
        before = torch._utils._rebuild_tensor_v2.__defaults__
        torch.save({"extra": BuildAttack()}, tmp_path / "w.pth")
        with pytest.raises(DataError):
            read_content(tmp_path / "w.pth")
        assert torch._utils._rebuild_tensor_v2.__defaults__ == before

    @pytest.mark.parametrize("attack", [b"cos\nsystem\n(S'true'\ntR.", b"\x80\x02}q\x00."])
    def test_a_bare_pickle(self, tmp_path: Path, attack: bytes) -> None:
        (tmp_path / "w.pth").write_bytes(attack)
        with pytest.raises(DataError):
            read_content(tmp_path / "w.pth")

    def archive(self, path: Path, *, data: bytes, storage: bytes, compressed: bool = False) -> Path:
        kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("a/data.pkl", data)
            archive.writestr("a/data/0", storage)
        return path

    def pickled(self, *, count: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        """A tensor of four numbers, described as somebody pleases."""
        stream = io.BytesIO()
        torch.save({"w": torch.ones(4)}, stream)
        with zipfile.ZipFile(stream) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            data = archive.read(name)

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                return ("storage", torch.FloatStorage, "0", "cpu", count) if value == "!" else None

        out = io.BytesIO()
        rebuild = Attack(torch._utils._rebuild_tensor_v2, "!", 0, size, stride, False, {})
        Pickler(out, 2).dump({"w": rebuild})
        assert b"_rebuild_tensor_v2" in data
        return out.getvalue()

    @pytest.mark.parametrize(
        ("count", "size", "stride"),
        [(4000, (4000,), (1,)), (4, (4000,), (1,)), (4, (2, 2), (-1, 1)), (4, (-3,), (1,))],
    )
    def test_tensors_beyond_their_numbers(
        self, tmp_path: Path, count: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        data = self.pickled(count=count, size=size, stride=stride)
        path = self.archive(tmp_path / "w.pth", data=data, storage=bytes(16))
        with pytest.raises((DataError, RuntimeError)):
            read_content(path)["w"].read()

    def test_numbers_that_changed_on_the_disk(self, tmp_path: Path) -> None:
        path = tmp_path / "w.pth"
        torch.save({"w": torch.full((4,), 7.0)}, path)
        data = path.read_bytes()
        seven = torch.tensor(7.0).numpy().tobytes()
        path.write_bytes(data.replace(seven * 4, seven * 3 + bytes(4)))
        with pytest.raises(ValueError, match="checksum of a tensor's numbers is wrong"):
            read_content(path)["w"].read()

    def test_a_compressed_archive(self, tmp_path: Path) -> None:
        data = self.pickled(count=4, size=(4,), stride=(1,))
        assert read_content(self.archive(tmp_path / "w.pth", data=data, storage=bytes(16)))
        path = self.archive(tmp_path / "z.pth", data=data, storage=bytes(1 << 20), compressed=True)
        with pytest.raises(DataError, match="a compressed archive, which torch"):
            read_content(path)

    def test_other_archives(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "w.npz", a=np.ones(2))
        with pytest.raises(DataError, match="a zip archive, but not one of"):
            read_content(tmp_path / "w.npz")


class TestNoFileOfWeights:
    def refused(self, path: Path, text: str) -> None:
        with pytest.raises(DataError, match=rf"^{path}: .*{text}"):
            read_content(path)

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    def test_empty_text_and_pictures(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(b"")
        self.refused(path, "the file is empty")
        for content in (b"epoch: 3\nlr: 0.1\n", b"\x89PNG\r\n\x1a\n0000", b"<html>"):
            path.write_bytes(content)
            self.refused(path, "not a safetensors file|neither safetensors nor by torch.save")

    @pytest.mark.parametrize("kept", [4, 9, 60, -8])
    def test_safetensors_that_were_cut_short(self, tmp_path: Path, kept: int) -> None:
        save_file({"a": torch.ones(10)}, tmp_path / "w.safetensors")
        path = tmp_path / "w.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        self.refused(path, "not a safetensors file")

    @pytest.mark.parametrize("length", [1 << 62, 1 << 30, 200])
    def test_a_header_longer_than_the_file(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / "w.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b'{"a": {}}')
        self.refused(path, "not a safetensors file")

    def test_safetensors_by_another_name(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(3)}, tmp_path / "model.bin")
        assert torch.equal(read_content(tmp_path / "model.bin")["a"].read(), torch.ones(3))
