import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysl.errors import RunFolderError
from raysl.folder.whole import write_json
from raysl.track.run_folder import MetricsFile, RunFolder, follow_metrics, read_metrics

HOLD = """
import sys
from pathlib import Path
from raysl.track.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


class TestLock:
    def test_refuses_a_second_process_and_names_the_first(self, tmp_path: Path) -> None:
        process = holder(tmp_path / "run")
        try:
            with (
                pytest.raises(RunFolderError, match="another name=") as caught,
                RunFolder(tmp_path / "run").locked(),
            ):
                pytest.fail("two processes hold the folder")
            assert f"{tmp_path}/run: process {process.pid} is training in this" in str(caught.value)
        finally:
            process.communicate(timeout=30)
        with RunFolder(tmp_path / "run").locked():
            assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())

    def test_goes_with_a_process_that_is_killed(self, tmp_path: Path) -> None:
        process = holder(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        with RunFolder(tmp_path).locked():
            assert (tmp_path / ".lock").read_text() == str(os.getpid())

    def test_is_free_again_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), RunFolder(tmp_path).locked():
            raise KeyError
        with RunFolder(tmp_path).locked():
            pass

    def test_other_folders_are_free(self, tmp_path: Path) -> None:
        with RunFolder(tmp_path / "a").locked(), RunFolder(tmp_path / "b").locked():
            held = [(tmp_path / name / ".lock").read_text() for name in ("a", "b")]
        assert held == [str(os.getpid())] * 2

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with (
            pytest.raises(RunFolderError, match=r"file/run: cannot be written: .*output_dir"),
            RunFolder(tmp_path / "file" / "run").locked(),
        ):
            pass


class TestRunFolder:
    def test_is_absolute_since_workers_are_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder = RunFolder(Path("runs/a"))
        monkeypatch.chdir("/")
        assert folder.metrics == tmp_path / "runs" / "a" / "metrics.jsonl"

    def test_everything_lies_below_it_under_a_name_of_its_own(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        paths = [path for name, path in vars(folder).items() if name not in ("path", "stored")]
        assert len(set(paths)) == len(paths)
        assert all(path.parent == tmp_path for path in paths)

    def test_results_are_none_until_they_are_whole(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        assert folder.read_results() is None
        folder.results.write_text('{"knn_top1": 0.')
        assert folder.read_results() is None
        write_json(folder.results, {"knn_top1": 0.5})
        assert folder.read_results() == {"knn_top1": 0.5}


def logged(path: Path, *steps: int, start_step: int = 0) -> None:
    file = MetricsFile(path, start_step=start_step)
    for step in steps:
        file.log({"train/loss": step / 10}, step=step)
    file.close()


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


class TestMetricsFile:
    def test_each_line_is_a_step_with_its_numbers_and_time(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        logged(path, 10, 20)
        first, second = read_metrics(path)
        assert first == {"step": 10, "time": first["time"], "train/loss": 1.0}
        assert second["time"] >= first["time"] > 1.6e9

    def test_a_line_can_be_read_as_soon_as_it_is_logged(self, tmp_path: Path) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl", start_step=0)
        file.log({"train/loss": 1}, step=10)
        assert steps_in(tmp_path / "metrics.jsonl") == [10]
        file.close()

    @pytest.mark.parametrize(
        ("start_step", "kept"), [(0, []), (20, [10, 20]), (25, [10, 20]), (99, [10, 20, 30])]
    )
    def test_a_resume_drops_the_lines_that_it_writes_again(
        self, tmp_path: Path, start_step: int, kept: list[int]
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        logged(path, 10, 20, 30)
        logged(path, 110, start_step=start_step)
        assert steps_in(path) == [*kept, 110]

    def test_a_resume_after_a_crash_does_not_glue_a_line_to_a_half_one(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        logged(path, 10, 20)
        with open(path, "a") as file:
            file.write('{"step": 30, "train/lo')
        assert steps_in(path) == [10, 20]
        logged(path, 30, start_step=20)
        assert steps_in(path) == [10, 20, 30]
        assert all(json.loads(line) for line in path.read_text().splitlines())

    @pytest.mark.parametrize(
        "damaged",
        [
            b"\x00\x00\xff",
            b"[1]",
            b'"text"',
            b'{"time": 2.0}',
            b'{"step": "2", "time": 2.0}',
            b"[" * 3000,
        ],
    )
    def test_a_line_in_between_that_is_no_record_is_left_out(
        self, tmp_path: Path, damaged: bytes
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        first, last = (b'{"step": %d, "time": 1.0}\n' % step for step in (1, 3))
        path.write_bytes(first + damaged + b"\n" + last)
        assert steps_in(path) == [1, 3]
        logged(path, 4, start_step=3)  # and by the run that goes on
        assert steps_in(path) == [1, 3, 4]

    def test_a_file_that_is_not_there_is_empty(self, tmp_path: Path) -> None:
        assert read_metrics(tmp_path / "metrics.jsonl") == []

    def test_a_loss_that_is_not_finite_can_be_read_again(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        file = MetricsFile(path, start_step=0)
        file.log({"train/loss": float("nan")}, step=1)
        file.close()
        assert math.isnan(read_metrics(path)[0]["train/loss"])


class TestAMetricsFileOnATroubledDisk:
    def full(self, monkeypatch: pytest.MonkeyPatch, file: MetricsFile) -> None:
        class Full(io.RawIOBase):
            def write(self, content: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(file, "_file", Full())

    def test_keeps_its_records_until_there_is_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        file = MetricsFile(path, start_step=0)
        with monkeypatch.context() as patch:
            self.full(patch, file)
            file.log({"train/loss": 1}, step=1)
            file.log({"train/loss": 2}, step=2)
        assert steps_in(path) == []
        file.log({"train/loss": 3}, step=3)
        assert steps_in(path) == [1, 2, 3]
        file.close()

    def test_says_at_the_end_what_it_could_not_write(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl", start_step=0)
        self.full(monkeypatch, file)
        file.log({"train/loss": 1}, step=1)
        told = f"{tmp_path}/metrics.jsonl: cannot be written: No space left on device"
        with pytest.raises(RunFolderError, match=told):
            file.close()

    def test_goes_on_after_a_part_of_a_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl", start_step=0)
        whole = file._file

        class AlmostFull(io.RawIOBase):
            def write(self, content: bytes) -> int:  # type: ignore[override]
                return whole.write(content[:5]) or 0

        monkeypatch.setattr(file, "_file", AlmostFull())
        file.log({"train/loss": 1}, step=1)
        assert steps_in(tmp_path / "metrics.jsonl") == [1]

    @pytest.mark.parametrize("harm", ["unlink", "rename", "replace", "copy", "folder"])
    def test_knows_whether_its_path_still_names_it(self, tmp_path: Path, harm: str) -> None:
        path = tmp_path / "run" / "metrics.jsonl"
        file = MetricsFile(path, start_step=0)
        file.log({"train/loss": 1}, step=1)
        assert file.is_in_place()
        content = path.read_text()
        path.rename(tmp_path / "elsewhere")
        if harm == "rename":
            path.write_text(content[:-5])
        elif harm == "replace":
            path.write_text(content.replace("1.0", "2.0"))
        elif harm == "copy":  # the same content; what follows tells them apart
            path.write_text(content)
            file.log({"train/loss": 2}, step=2)
        elif harm == "folder":
            path.parent.rmdir()
        assert not file.is_in_place()

    def test_on_a_disk_that_renumbers_files_is_in_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some network disks give a file another number once they have forgotten it."""
        file = MetricsFile(tmp_path / "metrics.jsonl", start_step=0)
        file.log({"train/loss": 1}, step=1)
        other = os.stat(tmp_path)
        numbers = (other.st_mode, other.st_ino, other.st_dev, 1, 0, 0)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((*numbers, size, 0, 0, 0)))
        assert file.is_in_place()


class TestFollow:
    def test_goes_on_where_it_stopped_and_waits_for_the_end_of_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "time": 1.0}\n{"step": 2, "time": 2.0}\n{"st')
        found = list(follow_metrics(path, 0))
        assert [record["step"] for record, _ in found] == [1, 2]
        offset = found[-1][1]
        assert list(follow_metrics(path, offset)) == []
        with open(path, "a") as file:
            file.write('ep": 3, "time": 3.0}\n')
        last = {"step": 3, "time": 3.0}
        assert list(follow_metrics(path, offset)) == [(last, path.stat().st_size)]
