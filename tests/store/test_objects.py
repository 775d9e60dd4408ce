"""The objects of a store: whole or absent, and asked for with patience."""

import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import RunFolderError
from raysl.store import objects
from raysl.store.objects import Store


@pytest.fixture(params=["s3", "memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder in each kind of store."""
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('bucket')}/some/run")
    if request.param == "memory":
        return Store(f"memory://{tmp_path.name}/run")
    return Store(f"file://{tmp_path}/store/run")


class TestStore:
    def test_what_is_written_is_listed_read_and_deleted(self, store: Store, tmp_path: Path) -> None:
        store.put("a.json", b"{}")
        store.put("checkpoints/step-1/state.pt", b"state")
        store.put("stop", b"")
        assert {name: entry.size for name, entry in store.list().items()} == {
            "a.json": 2,
            "checkpoints/step-1/state.pt": 5,
            "stop": 0,
        }
        assert set(store.list(recursive=False)) == {"a.json", "stop"}
        assert set(store.list("checkpoints")) == {"checkpoints/step-1/state.pt"}
        assert store.list("nowhere") == {}
        assert store.get("a.json") == b"{}"
        assert store.get("b.json") is None
        store.get_file("checkpoints/step-1/state.pt", tmp_path / "new" / "state.pt")
        assert (tmp_path / "new" / "state.pt").read_bytes() == b"state"
        store.put("a.json", b"[1]")
        assert store.get("a.json") == b"[1]"
        store.delete(["a.json", "gone"])
        assert set(store.list()) == {"checkpoints/step-1/state.pt", "stop"}

    def test_a_large_file_arrives_as_it_is(self, store: Store, tmp_path: Path) -> None:
        content = bytes(range(256)) * (9 << 12)  # more than one part of an upload
        (tmp_path / "large").write_bytes(content)
        store.put_file("large", tmp_path / "large")
        store.get_file("large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content

    def test_a_folder_takes_another_name(self, store: Store) -> None:
        for name in ("a", "b/c", ".lease"):
            store.put(name, name.encode())
        other = Store(f"{store.address}.2")
        store.move_to(other, without=[".lease"])
        assert set(store.list()) == {".lease"}
        assert {name: other.get(name) for name in other.list()} == {"a": b"a", "b/c": b"b/c"}

    def test_another_process_finds_the_same_objects(self, bucket: str) -> None:
        Store(f"{bucket}/run").put("a", b"here")
        assert pickle.loads(pickle.dumps(Store(f"{bucket}/run"))).get("a") == b"here"


class Flaky:
    """Fails the first ``times`` times with ``error``."""

    def __init__(self, times: int, error: Exception) -> None:
        self.left, self.error, self.calls = times, error, 0

    def __call__(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls <= self.left:
            raise self.error


class TestRetries:
    @pytest.fixture
    def pauses(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        slept: list[float] = []
        monkeypatch.setattr(time, "sleep", slept.append)
        return slept

    def test_a_passing_error_costs_pauses_only(
        self, pauses: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = Flaky(3, OSError("NETWORK_CONNECTION"))
        monkeypatch.setattr(Store, "_write", write)
        Store("memory://flaky").put("a", b"")
        assert write.calls == 4
        assert pauses == [0.5, 1.0, 2.0]

    def test_a_lasting_error_is_raised_at_once(
        self, pauses: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Store, "_write", Flaky(9, OSError("AWS Error ACCESS_DENIED")))
        with pytest.raises(RunFolderError, match="ACCESS_DENIED"):
            Store("memory://flaky").put("a", b"")
        assert pauses == []

    def test_a_missing_bucket_is_named_at_once(self, bucket: str, pauses: list[float]) -> None:
        with pytest.raises(RunFolderError) as caught:
            Store("s3://no-such-bucket/runs").put("a", b"")
        assert str(caught.value).startswith("output_dir=s3://no-such-bucket/runs: ")
        assert "Check the bucket" in str(caught.value)
        assert pauses == []
        assert bucket

    def test_a_store_that_stays_down_is_one_error_that_says_what_was_tried(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Store, "_write", Flaky(99, OSError("NETWORK_CONNECTION")))
        monkeypatch.setattr(objects, "_PAUSES_S", (0.01, 0.02))
        began = time.monotonic()
        with pytest.raises(RunFolderError) as caught:
            Store("memory://flaky", retry_s=0.1).put("checkpoints/x", b"")
        assert time.monotonic() - began < 5
        assert "writing checkpoints/x" in str(caught.value)
        assert "the same command resumes" in str(caught.value)

    def test_a_full_local_disk_is_not_taken_for_the_store(
        self, pauses: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Store, "_write", Flaky(9, OSError(28, "No space left on device")))
        with pytest.raises(RunFolderError, match="RAYSL_SCRATCH"):
            Store("memory://flaky").put("a", b"")
        assert pauses == []


def test_an_upload_that_breaks_off_leaves_the_object_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"file://{tmp_path}", retry_s=0.0)
    store.put("a", b"before")
    whole = Store._write

    def breaks(self: Store, path: str, content: Any) -> None:
        whole(self, path, content.slice(0, 2))
        raise OSError("connection lost")

    monkeypatch.setattr(Store, "_write", breaks)
    with pytest.raises(RunFolderError):
        store.put("a", b"after")
    assert store.get("a") == b"before"
