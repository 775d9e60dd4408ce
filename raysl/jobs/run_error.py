"""``error.json`` of a run folder: what ended the run, for whoever was not there."""

from typing import cast

from raysl.errors import ErrorRecord, RayslError, to_record
from raysl.folder.whole import read_json, write_json
from raysl.track.run_folder import RunFolder

_NAME = "error.json"


def write_error(folder: RunFolder, error: RayslError) -> None:
    """Keep what ended a run."""
    write_json(folder.path / _NAME, to_record(error))


def read_error(folder: RunFolder) -> ErrorRecord | None:
    """Return what ended a run, or None if nothing did."""
    return cast(ErrorRecord | None, read_json(folder.path / _NAME))


def forget_error(folder: RunFolder) -> None:
    """Take it away: the run begins, or goes on."""
    (folder.path / _NAME).unlink(missing_ok=True)
