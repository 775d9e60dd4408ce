import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from raysl.errors import DataError
from raysl.sources import storage
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig
from raysl.sources.storage import list_files, list_glob, read_file, readable, resolve, with_retries


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in this process's memory: any scheme that pyarrow does not know."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.pipe({"/raysl/b/2.png": b"two", "/raysl/a/1.png": b"one", "/raysl/.x/3.png": b"x"})
    yield store
    store.rm("/raysl", recursive=True)


class TestResolve:
    @pytest.mark.parametrize(
        ("uri", "path"),
        [
            ("s3://bucket", "bucket"),
            ("s3://bucket/", "bucket"),
            ("s3://bucket/my folder/a%20b", "bucket/my folder/a%20b"),
            ("s3://bucket/x-{000..009}.tar", "bucket/x-{000..009}.tar"),
            ("s3://bucket/x-[0-9]?.parquet", "bucket/x-[0-9]?.parquet"),
            ("s3://bucket/x?region=eu-west-1", "bucket/x"),
            ("gs://bucket/x/*.tar", "bucket/x/*.tar"),
            ("gcs://bucket/x", "bucket/x"),
            ("abfs://box@account.dfs.core.windows.net/x y", "box/x y"),
        ],
    )
    def test_a_path_in_a_store_is_taken_as_it_stands(
        self, uri: str, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # or AWS is asked for a region
        filesystem, found = resolve(uri)
        assert found == path
        assert pickle.loads(pickle.dumps(filesystem)) == filesystem

    def test_another_store_of_s3s_language_goes_with_the_file_system(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, "http://127.0.0.1:1234")
            filesystem, _ = resolve("s3://bucket/x")
            monkeypatch.delenv(name)
            assert b"http://127.0.0.1:1234" in pickle.dumps(filesystem)

    def test_spaces_and_escapes_in_a_file_uri(self) -> None:
        assert resolve("file:///tmp/a b%20c")[1] == "/tmp/a b c"

    def test_every_other_scheme_is_fsspecs(self, memory: Any) -> None:
        config = DataConfig(source="memory://raysl")
        source = pickle.loads(pickle.dumps(open_source(config, data=config)))
        assert source.read([1, 0]) == [b"two", b"one"]
        assert source.class_names == ["a", "b"]
        assert source.where(1) == "/raysl/b/2.png"

    def test_a_package_that_is_missing_is_named(self) -> None:
        pytest.importorskip("fsspec")
        try:
            import adlfs  # noqa: F401
        except ImportError:
            with pytest.raises(DataError, match=r"^data\.source=az://box/x: .*pip install adlfs$"):
                resolve("az://box/x")

    def test_a_store_that_does_not_answer_is_named_with_what_to_check(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(uri: str) -> None:
            raise OSError("When resolving region:\n  NETWORK_CONNECTION")

        monkeypatch.setattr(storage, "_from_fsspec", refuse)
        with pytest.raises(
            DataError, match=r"^data\.source=az://b/x: When resolving region: NETWORK_C.*AZURE_STOR"
        ):
            resolve("az://b/x")


class TestPatience:
    """A file system that is not local, and reads that fail so many times."""

    REMOTE = pafs.PyFileSystem(pafs.FSSpecHandler(None))

    @pytest.fixture
    def pauses(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        seen: list[float] = []
        monkeypatch.setattr(storage.time, "sleep", seen.append)
        return seen

    def _failing(self, times: int, error: OSError) -> Any:
        left = [error] * times

        def read() -> str:
            if left:
                raise left.pop()
            return "read"

        return read

    def test_asks_again_after_growing_pauses(self, pauses: list[float]) -> None:
        failing = self._failing(3, OSError("AWS Error NETWORK_CONNECTION"))
        assert with_retries(self.REMOTE, failing) == "read"
        assert pauses == sorted(pauses)
        assert len(set(pauses)) == 3

    def test_gives_up_in_the_end(self, pauses: list[float]) -> None:
        with pytest.raises(OSError, match="SLOW_DOWN"):
            with_retries(self.REMOTE, self._failing(99, OSError("SLOW_DOWN")))
        assert len(pauses) == 3

    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError(2, "gone"),
            PermissionError(13, "no"),
            OSError("AWS Error ACCESS_DENIED"),
        ],
    )
    def test_does_not_wait_for_what_will_not_pass(
        self, error: OSError, pauses: list[float]
    ) -> None:
        with pytest.raises(type(error)):
            with_retries(self.REMOTE, self._failing(1, error))
        assert pauses == []

    def test_does_not_ask_a_local_disk_again(self, pauses: list[float]) -> None:
        for local in (pafs.LocalFileSystem(), pafs.SubTreeFileSystem("/", pafs.LocalFileSystem())):
            with pytest.raises(OSError, match="Input/output"):
                with_retries(local, self._failing(1, OSError(5, "Input/output error")))
        assert pauses == []


class TestFiles:
    def test_a_listing_is_the_same_from_a_disk_and_from_a_store(
        self, tmp_path: Path, memory: Any
    ) -> None:
        for name, content in (("b/2.png", b"two"), ("a/1.png", b"one"), (".x/3.png", b"x")):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(content)
        store, root = resolve("memory://raysl")
        listings = [
            list_files(pafs.LocalFileSystem(), str(tmp_path), (".png",)),
            list_files(store, root, (".png",)),
        ]
        assert listings[0] == listings[1]
        assert listings[0].to_pydict() == {"path": [b"a/1.png", b"b/2.png"], "bytes": [3, 3]}

    def test_an_empty_folder_is_an_empty_listing(self, tmp_path: Path) -> None:
        assert list_files(pafs.LocalFileSystem(), str(tmp_path), (".png",)).num_rows == 0

    def test_a_local_name_may_be_bytes(self, tmp_path: Path) -> None:
        path = os.fsencode(tmp_path) + b"/\xff"
        with open(path, "wb") as file:
            file.write(b"there")
        assert read_file(pafs.LocalFileSystem(), path) == b"there"
        with pytest.raises(DataError, match=r"\\xfe: cannot be read: No such file or directory$"):
            read_file(pafs.LocalFileSystem(), path.replace(b"\xff", b"\xfe"))

    def test_any_name_prints(self) -> None:
        assert readable(b"a\xff") == readable("a\udcff") == "a\\xff"
        assert readable("\u00fc") == "\u00fc"


class TestGlob:
    @pytest.mark.parametrize(
        ("path", "files"),
        [
            (
                "*.parquet",
                ["a/1.parquet", "b/10.parquet", "b/2.parquet", "table.parquet/0.parquet"],
            ),
            ("b/*.parquet", ["b/10.parquet", "b/2.parquet"]),
            ("b/?.parquet", ["b/2.parquet"]),
            ("?/1*.parquet", ["a/1.parquet", "b/10.parquet"]),
            ("b/[0-5].parquet", ["b/2.parquet"]),
            ("nowhere/*.parquet", []),
            ("b/z*.parquet", []),
            ("nowhere", []),
        ],
    )
    def test_matches_names_that_are_not_hidden(
        self, path: str, files: list[str], tmp_path: Path
    ) -> None:
        for name in (
            "b/2.parquet",
            "a/1.parquet",
            "b/10.parquet",
            "b/notes.txt",
            "table.parquet/0.parquet",
            "b/_9.parquet",
            "_temporary/3.parquet",
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        found = list_glob(pafs.LocalFileSystem(), f"{tmp_path}/{path}")
        assert [name.removeprefix(f"{tmp_path}/") for name in found] == files
