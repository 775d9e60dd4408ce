"""Sources in a real object store: moto's server, which speaks S3, on the loopback."""

import io
import logging
import pickle
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.errors import DataError
from raysl.sources import storage
from raysl.sources.manifest import Manifest, ManifestFile, read_manifest, write_manifest
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Source, Unreadable
from raysl.sources.storage import resolve

moto_server = pytest.importorskip(
    "moto.server", reason="no moto; `uv sync --all-groups` installs it"
)

BUCKET = "images"


def _image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(100 + 37 * number)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same eight images as files, Parquet, packed Parquet and tar shards."""
    root = tmp_path_factory.mktemp("local")
    for number in range(8):
        path = root / "folder" / f"class {number % 2}" / f"\u00fc {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_image(number))
    for name in ("parquet", "packed", "tar"):
        (root / name).mkdir()
    files = []
    for shard in range(2):
        rows = range(4 * shard, 4 * shard + 4)
        table = pa.table({"image": [_image(n) for n in rows], "label": [n % 2 for n in rows]})
        for name in ("parquet", "packed"):
            path = root / name / f"part-{shard:05}.parquet"
            pq.write_table(table, path, row_group_size=2)
        sizes = tuple(len(_image(n)) + len(_image(n + 1)) for n in rows[::2])
        files.append(ManifestFile(path.name, path.stat().st_size, (2, 2), sizes))
        with tarfile.open(root / "tar" / f"data-{shard:03}.tar", "w") as tar:
            for number in rows:
                for suffix, data in (("png", _image(number)), ("cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    total = sum(sum(file.bytes) for file in files)
    fingerprint = "0123456789abcdef"
    manifest = Manifest(8, total, fingerprint, "image", "label", ("a", "b"), tuple(files), {})
    write_manifest(pafs.LocalFileSystem(), str(root / "packed"), manifest)
    return root


@pytest.fixture(scope="module")
def store(local: Path) -> Iterator[str]:
    """Start the store with all of ``local`` in a bucket; return its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            address = f"http://{host}:{port}"
            _point_to(patch, address)
            filesystem = pafs.S3FileSystem(
                endpoint_override=address, allow_bucket_creation=True, region="us-east-1"
            )
            filesystem.create_dir(BUCKET)
            pafs.copy_files(str(local), BUCKET, destination_filesystem=filesystem)
            yield address
    finally:
        server.stop()


def _point_to(patch: pytest.MonkeyPatch, address: str) -> None:
    patch.setenv("AWS_ENDPOINT_URL", address)
    patch.setenv("AWS_ACCESS_KEY_ID", "name")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def _open(source: str, **settings: Any) -> Source:
    config = DataConfig(source=source, **settings)
    return open_source(config, data=config)


@pytest.mark.usefixtures("store")
class TestReading:
    @pytest.mark.parametrize(
        ("path", "settings"),
        [
            ("folder", {}),
            ("folder", {"filter": (("bytes", ">", 200),), "limit": 3}),
            ("parquet", {}),
            ("parquet/part-00001.parquet", {}),
            ("parquet/*.parquet", {"filter": (("label", "==", 1),)}),
            ("packed", {}),
            ("tar", {}),
            ("tar/data-{000..001}.tar", {"limit": 5}),
            ("tar/*1.tar", {}),
        ],
    )
    def test_gives_the_same_as_from_a_disk(
        self, path: str, settings: dict[str, Any], local: Path
    ) -> None:
        there = _open(f"{local}/{path}", **settings)
        source = pickle.loads(pickle.dumps(_open(f"s3://{BUCKET}/{path}", **settings)))
        count = int(there.group_sizes.sum())
        order = np.random.default_rng(0).permutation(count)
        assert source.group_sizes.tolist() == there.group_sizes.tolist()
        assert source.read(order) == there.read(order)
        assert source.labels().tolist() == there.labels().tolist()  # type: ignore[union-attr]
        assert source.class_names == there.class_names
        assert source.fingerprint == there.fingerprint
        assert source.where(count - 1) == there.where(count - 1).replace(str(local), BUCKET)

    def test_a_manifest_is_written_and_read(self, local: Path) -> None:
        filesystem, folder = resolve(f"s3://{BUCKET}/new folder")
        manifest = read_manifest(pafs.LocalFileSystem(), str(local / "packed"))
        assert manifest is not None
        write_manifest(filesystem, folder, manifest)
        assert read_manifest(filesystem, folder) == manifest

    def test_a_packed_folder_opens_without_a_footer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("raysl.sources.footers.open_parquet", None)
        assert _open(f"s3://{BUCKET}/packed").fingerprint == "0123456789abcdef"


@pytest.mark.usefixtures("store")
class TestErrors:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("s3://no-such-bucket/x", r"no such bucket, .*'no-such-bucket'"),
            ("s3://no-such-bucket/x/*.tar", r"no such bucket, .*'no-such-bucket'"),
            (f"s3://{BUCKET}/nowhere", r"no such object or folder \(images/nowhere\)"),
            (f"s3://{BUCKET}/nowhere/*.parquet", r"no such object or folder"),
        ],
    )
    def test_a_missing_bucket_or_key_is_named(self, source: str, message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            _open(source)
        assert str(caught.value).startswith(f"data.source={source}: ")

    def test_a_key_that_has_gone_is_named_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        filesystem, _ = resolve(f"s3://{BUCKET}/gone")
        for name in ("a.png", "b.png"):
            with filesystem.open_output_stream(f"{BUCKET}/gone/{name}") as stream:
                stream.write(b"image")
        source = _open(f"s3://{BUCKET}/gone")
        filesystem.delete_file(f"{BUCKET}/gone/b.png")
        pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", pauses.append)
        there, gone = source.read([0, 1])
        assert there == b"image"
        assert isinstance(gone, Unreadable)
        assert gone.reason.startswith("cannot be read: ")
        assert f"{BUCKET}/gone/b.png" in gone.reason
        assert pauses == []

    def test_a_shard_that_is_missing_is_named(self) -> None:
        with pytest.raises(DataError, match=rf"^{BUCKET}/tar/data-002\.tar: cannot be read"):
            _open(f"s3://{BUCKET}/tar/data-{{000..002}}.tar")

    def test_a_store_that_is_down_is_named_with_what_to_check(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _point_to(monkeypatch, "http://127.0.0.1:1")
        monkeypatch.setattr(storage, "_PAUSES_S", ())
        with pytest.raises(
            DataError, match=r"^data\.source=s3://images/x: .*NETWORK.*AWS_ENDPOINT"
        ):
            _open(f"s3://{BUCKET}/x")
