"""A local folder and its copy in a store: whatever ends in the middle, what is there fits."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from raysl.errors import RunFolderError
from raysl.store import mirror as module
from raysl.store.mirror import Mirror, StoredRun, checkpoint_steps
from raysl.store.objects import Store


class Noted(Store):
    """A store that notes its requests, and may go down after some."""

    def __init__(self, address: str) -> None:
        super().__init__(address, retry_s=0.0)
        self.requests: list[str] = []
        self.left = 10**9  # requests until it goes down

    def put(self, name: str, content: bytes) -> None:
        self._count(f"put {name}")
        super().put(name, content)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._count(f"delete {name}")
            super().delete([name])

    def _count(self, request: str) -> None:
        if not self.left:
            raise RunFolderError("down")
        self.left -= 1
        self.requests.append(request)


@pytest.fixture
def store(tmp_path: Path) -> Noted:
    return Noted(f"memory://{tmp_path.name}/mirror")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 10)


def mirror(folder: Path, store: Store) -> Mirror:
    folder.mkdir(exist_ok=True)
    return Mirror(folder, store, check=lambda _: None)


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def checkpoint(folder: Path, step: int) -> None:
    write(folder, f"checkpoints/step-{step:09d}/state.pt", f"state of {step}")


def append(folder: Path, name: str, text: str) -> None:
    with open(folder / name, "a") as file:
        file.write(text)


class TestOrder:
    def test_a_checkpoint_comes_after_what_belongs_to_it_and_before_the_results(
        self, tmp_path: Path, store: Noted
    ) -> None:
        here = tmp_path / "here"
        copy = mirror(here, store)
        for name in ("results.json", "to_evaluate/step-000000002.safetensors", "metrics.jsonl"):
            write(here, name, name)
        checkpoint(here, 2)
        write(here, "checkpoints/step-000000002/more.json", "{}")
        copy.push()
        assert [each.removeprefix("put ") for each in store.requests] == [
            "metrics.jsonl",
            "to_evaluate/step-000000002.safetensors",
            "checkpoints/step-000000002/more.json",
            "checkpoints/step-000000002/state.pt",
            "results.json",
        ]

    def test_the_results_of_a_run_that_goes_on_are_deleted_first_the_rest_last(
        self, tmp_path: Path, store: Noted
    ) -> None:
        here = tmp_path / "here"
        copy = mirror(here, store)
        for name in ("results.json", "config.yaml", "old.png"):
            write(here, name, "before")
        copy.push()
        store.requests.clear()
        (here / "results.json").unlink()
        (here / "old.png").unlink()
        write(here, "config.yaml", "a longer run")
        copy.push()
        assert store.requests == ["delete results.json", "put config.yaml", "delete old.png"]

    def test_whatever_request_is_the_last_a_checkpoint_finds_its_metrics(
        self, tmp_path: Path, store: Noted
    ) -> None:
        requests = 0
        while True:
            store = Noted(f"memory://{tmp_path.name}/{requests}")
            store.left = requests
            here = tmp_path / str(requests)
            copy = mirror(here, store)
            try:
                for step in (1, 2, 3):
                    append(here, "metrics.jsonl", f'{{"step": {step}}}\n')
                    write(here, f"to_evaluate/step-{step}", "weights")
                    checkpoint(here, step)
                    (here / f"to_evaluate/step-{step - 1}").unlink(missing_ok=True)
                    copy.push()
            except RunFolderError:
                steps = checkpoint_steps(store)
                lines = (store.get("metrics.jsonl") or b"").decode()
                assert all(f'"step": {step}' in lines for step in steps)
                assert all(f"to_evaluate/step-{step}" in store.list() for step in steps[-1:])
                requests += 1
                continue
            assert requests > 8
            return

    def test_older_checkpoints_go_once_as_many_newer_ones_are_there(
        self, tmp_path: Path, store: Noted
    ) -> None:
        here, new = tmp_path / "here", tmp_path / "new"
        first, second = mirror(here, store), mirror(new, store)
        for step in (1, 2, 3):
            checkpoint(here, step)
        first.push()
        second.pull_checkpoint(3)
        assert not (new / "checkpoints/step-000000001").exists()
        checkpoint(new, 4)
        second.push()
        assert checkpoint_steps(store) == [1, 2, 3, 4]
        checkpoint(new, 5)
        shutil.rmtree(new / "checkpoints/step-000000003")
        checkpoint(new, 6)
        second.push()
        assert checkpoint_steps(store) == [4, 5, 6]

    def test_nothing_is_asked_of_the_store_if_nothing_has_changed(
        self, tmp_path: Path, store: Noted
    ) -> None:
        here = tmp_path / "here"
        checks: list[int] = []
        here.mkdir()
        copy = Mirror(here, store, check=lambda _: checks.append(1))
        write(here, "config.yaml", "a")
        append(here, "metrics.jsonl", "{}\n")
        copy.push()
        copy.push()
        assert store.requests == ["put config.yaml", "put metrics.jsonl"]
        assert checks == [1]

    def test_who_may_not_write_writes_nothing(self, tmp_path: Path, store: Noted) -> None:
        def check(_: Store) -> None:
            raise RunFolderError("taken over")

        write(tmp_path / "here", "config.yaml", "a")
        with pytest.raises(RunFolderError, match="taken over"):
            Mirror(tmp_path / "here", store, check=check).push()
        assert store.requests == []


class TestSeveralProcesses:
    def test_each_only_replaces_and_deletes_what_it_knows(
        self, tmp_path: Path, store: Noted
    ) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        driver, worker = mirror(one, store), mirror(other, store)
        write(one, "config.yaml", "run")
        driver.push()
        worker.pull(lambda name: name == "config.yaml")
        assert (other / "config.yaml").read_text() == "run"
        checkpoint(other, 1)
        worker.push()
        driver.push()
        (other / "config.yaml").unlink()
        write(one, "config.yaml", "newer")
        driver.push()
        assert store.get("config.yaml") == b"newer"
        assert checkpoint_steps(store) == [1]

    def test_what_another_deleted_goes_here_too(self, tmp_path: Path, store: Noted) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        driver, worker = mirror(one, store), mirror(other, store)
        write(one, "stop", "")
        driver.push()
        worker.pull(lambda name: name == "stop")
        assert (other / "stop").exists()
        (one / "stop").unlink()
        driver.push()
        worker.pull(lambda name: name == "stop")
        assert not (other / "stop").exists()

    def test_a_lease_and_half_an_upload_are_not_part_of_the_folder(
        self, tmp_path: Path, store: Noted
    ) -> None:
        for name in (".lease.json", "checkpoints/.tmp-state.pt"):
            store.put(name, b"{}")
        copy = mirror(tmp_path / "here", store)
        copy.pull(lambda _: True)
        copy.push()
        assert list((tmp_path / "here").iterdir()) == []
        assert len(store.list()) == 2

    def test_a_checkpoint_counts_once_its_state_is_there(self, store: Noted) -> None:
        store.put("checkpoints/step-000000001/more.json", b"{}")
        store.put("checkpoints/damaged-step-000000004/state.pt", b"")
        assert checkpoint_steps(store) == []
        store.put("checkpoints/step-000000001/state.pt", b"")
        assert checkpoint_steps(store) == [1]


@pytest.mark.usefixtures("small_parts")
class TestFilesThatGrow:
    def test_a_new_line_uploads_the_last_part_only(self, tmp_path: Path, store: Noted) -> None:
        here = tmp_path / "here"
        copy = mirror(here, store)
        append(here, "metrics.jsonl", "a" * 25)
        copy.push()
        names = ["metrics.jsonl", "metrics.jsonl.000001", "metrics.jsonl.000002"]
        assert store.requests == [f"put {name}" for name in names]
        store.requests.clear()
        append(here, "metrics.jsonl", "b" * 8)
        copy.push()
        assert store.requests == ["put metrics.jsonl.000002", "put metrics.jsonl.000003"]
        there = b"".join(store.get(name) or b"" for name in [*names, "metrics.jsonl.000003"])
        assert there == (here / "metrics.jsonl").read_bytes()

    @pytest.mark.parametrize("length", [0, 7, 10, 20, 24])
    def test_a_file_that_was_cut_is_cut_there(
        self, length: int, tmp_path: Path, store: Noted
    ) -> None:
        here = tmp_path / "here"
        copy = mirror(here, store)
        append(here, "metrics.jsonl", "0123456789" * 4 + "x")
        copy.push()
        write(here, "metrics.jsonl", ("0123456789" * 4)[:length])
        copy.push()
        new = tmp_path / "new"
        mirror(new, store).pull(lambda _: True)
        assert (new / "metrics.jsonl").read_bytes() == (here / "metrics.jsonl").read_bytes()

    def test_a_process_that_goes_on_uploads_no_part_again(
        self, tmp_path: Path, store: Noted
    ) -> None:
        here, new = tmp_path / "here", tmp_path / "new"
        append(mirror(here, store).folder, "metrics.jsonl", "a" * 25)
        first = mirror(here, store)
        first.push()
        store.requests.clear()
        second = mirror(new, store)
        second.pull(lambda _: True)
        text = (new / "metrics.jsonl").read_text()
        write(new, "metrics.jsonl", text + "b")  # as a run that resumes does
        second.push()
        assert store.requests == ["put metrics.jsonl.000002"]

    def test_a_reader_that_follows_sees_lines_appended(self, tmp_path: Path, store: Noted) -> None:
        here, there = tmp_path / "here", tmp_path / "there"
        writer, reader = mirror(here, store), mirror(there, store)
        append(here, "metrics.jsonl", "a" * 13)
        writer.push()
        reader.pull(lambda _: True)
        inode = (there / "metrics.jsonl").stat().st_ino
        append(here, "metrics.jsonl", "b" * 22)
        writer.push()
        reader.pull(lambda _: True)
        assert (there / "metrics.jsonl").read_text() == "a" * 13 + "b" * 22
        assert (there / "metrics.jsonl").stat().st_ino == inode
        write(here, "metrics.jsonl", "a" * 5)  # the workers started again
        writer.push()
        reader.pull(lambda _: True)
        assert (there / "metrics.jsonl").read_text() == "a" * 5
        assert (there / "metrics.jsonl").stat().st_ino != inode

    def test_one_that_goes_goes_with_all_its_parts(self, tmp_path: Path, store: Noted) -> None:
        here = tmp_path / "here"
        copy = mirror(here, store)
        append(here, "bad_images.jsonl", "a" * 25)
        copy.push()
        (here / "bad_images.jsonl").rename(here / "bad_images.0123.jsonl")
        copy.push()
        names = {f"bad_images.0123.jsonl{end}" for end in ("", ".000001", ".000002")}
        assert set(store.list()) == names


def test_what_ray_s_controller_gets_of_a_run_loads_no_torch(store: Noted) -> None:
    run = StoredRun(Store(store.address), "token")
    code = "import pickle, sys; run = pickle.loads(sys.stdin.buffer.read()); "
    code += "assert run.newest_step() == 0; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(run), check=True)


def test_one_folder_is_pulled_without_looking_at_the_others(tmp_path: Path, store: Noted) -> None:
    for name in ("trials/0/metrics.jsonl", "trials/0/deep/more.json", "trials/1/results.json"):
        store.put(name, b"{}\n")
    here = tmp_path / "here"
    copy = mirror(here, store)
    copy.pull(lambda _: True, below="trials/0", recursive=False)
    assert [path.name for path in here.rglob("*.json*")] == ["metrics.jsonl"]
    copy.pull(lambda _: True)
    store.delete(["trials/0/metrics.jsonl", "trials/1/results.json"])
    copy.pull(lambda _: True, below="trials/0", recursive=False)
    assert sorted(path.name for path in here.rglob("*.json*")) == ["more.json", "results.json"]


def test_a_folder_below_is_written_under_the_lease_of_the_one_above(store: Noted) -> None:
    lease = {"host": "h", "pid": 1, "token": "mine", "machine": "m", "began": 0, "renewed": 0}
    store.put(".lease.json", json.dumps(lease).encode())
    run = pickle.loads(pickle.dumps(StoredRun(store, "mine").below("trials/0000").below("more")))
    assert run.store.address == f"{store.address}/trials/0000/more"
    run.check(run.store)
    store.put(".lease.json", json.dumps(lease | {"token": "another"}).encode())
    with pytest.raises(RunFolderError, match=r"/mirror: .* process 1 of h"):
        run.check(run.store)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_checkpoint_in_the_place_of_all_others_leaves_none_of_them(
    tmp_path: Path, store: Noted, step: int
) -> None:
    for own in (2, 4):
        store.put(f"checkpoints/step-{own:09d}/state.pt", b"own")
    here = tmp_path / "here"
    copy = mirror(here, store)
    copy.pull_checkpoint(4)
    shutil.rmtree(here / "checkpoints")
    checkpoint(here, step)
    copy.push()
    copy.drop_older()
    assert checkpoint_steps(store) == [step]
    assert store.get(f"checkpoints/step-{step:09d}/state.pt") == f"state of {step}".encode()
