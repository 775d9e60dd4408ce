"""Read and write ``error.json``, the error that ended a run."""

from typing import cast

from raysl.errors import ErrorRecord, RayslError, to_record
from raysl.folder.whole import read_json, write_json
from raysl.track.run_folder import RunFolder

_NAME = "error.json"


def write_error(folder: RunFolder, error: RayslError) -> None:
    """Write the error that ended a run."""
    write_json(folder.path / _NAME, to_record(error))


def read_error(folder: RunFolder) -> ErrorRecord | None:
    """Return the error that ended a run, or None."""
    return cast(ErrorRecord | None, read_json(folder.path / _NAME))


def forget_error(folder: RunFolder) -> None:
    """Delete the error when a run starts or resumes."""
    (folder.path / _NAME).unlink(missing_ok=True)
