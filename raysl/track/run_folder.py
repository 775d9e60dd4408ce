"""A run folder: its paths, lock, results, metrics file, and the error that ended the run."""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from raysl.errors import ErrorRecord, RayslError, to_record
from raysl.folder.lock import lock_folder
from raysl.folder.shared import Copied, SharedFolder
from raysl.folder.whole import disk_errors_named, json_object, read_json, write_json, write_text
from raysl.track.results import Results, with_new_names

JOB_FOLDER = "/runtime_resources/"
"""Part of the path of a Ray job's working directory, a copy that Ray deletes after the job."""

PROTOCOLS = "protocols"
"""Folder of the runs that measure a run's encoder by training copies of it."""

_CHECKPOINT_NAME = re.compile(r"^step-(\d{9})$")
_COMPARED_BYTES = 4096
_WAITING_NAME = re.compile(r"^step-(\d{9})\.safetensors$")


def working_folder() -> Path:
    """Return the folder for runs and mlflow.db: ``RAYSL_HOME``, else the current folder.

    In a Ray job, the current folder is a copy that Ray deletes. Without ``RAYSL_HOME``, a job's
    results therefore go to ``~/raysl`` of the node that the job runs on.
    """
    if "RAYSL_HOME" in os.environ:
        return Path(os.environ["RAYSL_HOME"]).expanduser().absolute()
    current = Path.cwd()
    return Path.home() / "raysl" if JOB_FOLDER in f"{current}/" else current


class RunFolder(SharedFolder):
    """The paths in a run folder, ``runs/NAME``.

    Args:
        path: Path of the run folder.
        stored: The folder's copy in a store; None if the folder is on a disk that all nodes share.
    """

    def __init__(self, path: Path, *, stored: Copied | None = None) -> None:
        super().__init__(path, stored=stored)
        self.config = self.path / "config.yaml"
        self.source = self.path / "source.json"
        self.extensions = self.path / "extensions.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.encoder = self.path / "encoder.safetensors"
        self.results = self.path / "results.json"
        self.projection_head = self.path / "projection_head.safetensors"
        self.classifier = self.path / "classifier.safetensors"
        self.labels = self.path / "labels.json"
        self.protocols = self.path / PROTOCOLS
        self.features = self.path / "features.npz"
        self.method_pictures = self.path / "method_pictures.npz"
        self.report = self.path / "report.html"
        self.pictures = self.path / "pictures"
        self.mlflow = self.path / "mlflow.json"
        self.bad_images = self.path / "bad_images.jsonl"
        self.to_evaluate = self.path / "to_evaluate"
        self.failed_evaluations = self.path / "failed_evaluations.jsonl"
        self.error = self.path / "error.json"
        self.events = self.path / "events.jsonl"
        self.last_step = self.path / "last_step"
        self.stacks = self.path / "stacks"  # of workers that hung
        self.stop = self.path / "stop"  # while it exists, the workers stop after their step

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder for one process; the lock also ends if the process dies.

        Raises:
            RunFolderError: On entering the ``with`` block, if another process holds the lock or the
                folder cannot be created.
        """
        return lock_folder(
            self.path, doing="is training in", instead="give this run another name=..."
        )

    def read_results(self) -> Results | None:
        """Return the results of a finished run, or None."""
        results = read_json(self.results)
        return None if results is None else with_new_names(results)

    def write_results(self, results: Results) -> None:
        """Write the results; a run is finished if they contain ``run_dir``."""
        write_json(self.results, results)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after ``step`` optimizer steps."""
    return folder / f"step-{step:09d}"


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, in order."""
    if not folder.is_dir():
        return []
    return list_steps(entry.name for entry in folder.iterdir())


def list_steps(names: Iterable[str]) -> list[int]:
    """Return the steps of the checkpoints among names of folders, in order."""
    matches = map(_CHECKPOINT_NAME.match, names)
    return sorted(int(match.group(1)) for match in matches if match)


def latest_step(folder: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 if there is none."""
    return max(list_checkpoints(folder), default=0)


def waiting_path(folder: Path, step: int) -> Path:
    """Return the path of an encoder after ``step`` steps that waits for its evaluation."""
    return folder / f"step-{step:09d}.safetensors"


def list_waiting(folder: Path) -> list[int]:
    """Return the steps of the encoders in a folder whose evaluation waits or runs, in order."""
    if not folder.is_dir():
        return []
    matches = (_WAITING_NAME.match(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


class MetricsFile:
    """Appends one JSON record per logging step to ``metrics.jsonl``.

    MLflow, the progress bar and the report all read this file. While it cannot be written, as on a
    full disk, its records wait in memory.

    Args:
        path: Path of the metrics file.
        start_step: Number of steps already done. Records of later steps are dropped, because the
            run repeats them.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        earlier_records = [record for record in read_metrics(path) if record["step"] <= start_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in earlier_records))
        self._path = path
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed by close()
        self._unwritten = b""

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append the metrics of a step, with the current time in seconds since 1970."""
        record = {"step": step, "time": time.time(), **{k: float(v) for k, v in metrics.items()}}
        self._unwritten += (json.dumps(record) + "\n").encode()
        with suppress(OSError):  # a full disk is reported when a checkpoint fails
            self._write()

    def is_in_place(self) -> bool:
        """Return whether the path still names this file; False if its folder was deleted or moved.

        An error other than a missing file, as from a disk that does not answer, counts as True.
        """
        try:
            named = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        opened = os.fstat(self._file.fileno())
        if (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino):
            return True
        # Some network disks change the numbers of a file, but not what it contains.
        begin = max(0, opened.st_size - _COMPARED_BYTES)
        written = os.pread(self._file.fileno(), _COMPARED_BYTES, begin)
        return bool(written) and self._path.read_bytes()[begin:] == written

    def close(self) -> None:
        """Write the records that wait, and close the file.

        Raises:
            RunFolderError: If records cannot be written.
        """
        try:
            with disk_errors_named(self._path):
                self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._unwritten:
            written = self._file.write(self._unwritten) or 0
            self._unwritten = self._unwritten[written:]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, without incomplete lines; [] if there is no file."""
    if not path.exists():
        return []
    return [record for record, _ in follow_metrics(path, 0)]


def follow_metrics(file: Path | int, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the records from a byte offset on, each with the offset of the next record.

    Args:
        file: Path of a metrics file, or the descriptor of an open one, which stays open.
        offset: Where a record begins, in bytes.
    """
    with open(file, "rb", closefd=isinstance(file, Path)) as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = json_object(line)  # None if a crash of the machine left it incomplete
            if record is not None and type(record.get("step")) is int:
                yield record, offset


def write_error(folder: RunFolder, error: RayslError) -> None:
    """Write the error that ended a run."""
    write_json(folder.error, to_record(error))


def read_error(folder: RunFolder) -> ErrorRecord | None:
    """Return the error that ended a run, or None if it did not end with one."""
    record = read_json(folder.error)
    if record is None:
        return None
    return ErrorRecord(error=str(record["error"]), message=str(record["message"]))


def forget_error(folder: RunFolder) -> None:
    """Delete the stored error, when a run starts or resumes."""
    folder.error.unlink(missing_ok=True)
