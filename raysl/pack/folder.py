"""The output folder of `raysl pack` and `raysl embed`.

Its claim is a file that describes the source and the settings of its content. Every file is written
under a hidden name and renamed when it is complete. So a file with its final name is complete,
however the process ends.
"""

import errno
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.folder.claim import changes, refusal
from raysl.folder.lock import LOCK, lock_folder
from raysl.sources.manifest import CLAIM_NAME
from raysl.sources.place import as_place
from raysl.sources.source import BUILT_IN
from raysl.sources.storage import resolve

CLAIM, BAD_IMAGES, BUCKETS = CLAIM_NAME, "bad_images.jsonl", "_buckets"
_MIB = 1 << 20
_SHOWN_BAD = 3
_KEY_NAMES = {
    "encoder": "the encoder (digest of its weights)",
    "fingerprint": "the source's fingerprint",
}


class Bad(NamedTuple):
    """An image that is left out."""

    row: int
    """Row of the source."""
    id: str
    """The image's id in every command, ``row_id``."""
    reason: str
    """Why the image is bad."""


class PackFolder:
    """A folder for shards, local or in an object store.

    Args:
        uri: A local path or a URI such as s3://bucket/folder.
        verb: The command of raysl that writes into it, for messages.
        claim_name: File name of the claim.

    Raises:
        DataError: If the URI's scheme is not known.
    """

    def __init__(self, uri: str, *, verb: str = "pack", claim_name: str = CLAIM) -> None:
        self.verb, self.claim_name = verb, claim_name
        self.filesystem, path = resolve(uri)
        self.root = path.rstrip("/")
        self.is_local = isinstance(self.filesystem, pafs.LocalFileSystem)
        # Absolute, because workers have other working directories.
        self.uri = self.root if self.is_local else uri

    def create(self, below: str = "") -> None:
        """Create the folder, or the folder ``below`` in it.

        Raises:
            DataError: If it cannot be created.
        """
        try:
            self.filesystem.create_dir(f"{self.root}/{below}".rstrip("/"), recursive=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.uri}: cannot be written: {error}") from None

    def refuse_inside(self, source: str, *, why: str) -> None:
        """Raise if the folder lies in the source.

        Args:
            source: The setting ``source`` of the configuration.
            why: What the source would then do, for the message.

        Raises:
            DataError: If the folder lies in the source.
        """
        if source in BUILT_IN:
            return
        filesystem, path = resolve(source)
        if filesystem == self.filesystem and f"{self.root}/".startswith(path.rstrip("/") + "/"):
            raise DataError(
                f"{self.uri} lies in the source, {source}, which would then {why}; give a folder "
                f"outside of it"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock a local folder for this process; the lock ends with the process.

        Raises:
            DataError: If another process holds the lock.
        """
        if not self.is_local:  # object stores have no locks
            yield
            return

        with lock_folder(
            Path(self.root),
            doing="writes into",
            instead="give another folder",
            elsewhere="give a folder that can",
            error=DataError,
        ):
            yield

    def file_sizes(self, below: str = "") -> dict[str, int]:
        """Return the sizes of the files directly in the folder, or in ``below``, by file name."""
        path = f"{self.root}/{below}".rstrip("/")
        infos = self.filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}

    @contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a file for writing; it gets its name when the block ends without an error.

        Raises:
            DataError: If it cannot be written, such as on a full disk; no part of it remains.
        """
        head, _, tail = name.rpartition("/")
        temporary = f"{self.root}/{head}/.{tail}.{uuid.uuid4().hex}".replace("//.", "/.")
        stream = None
        try:
            stream = self.filesystem.open_output_stream(temporary)
            yield stream
            stream.close()
            self.filesystem.move(temporary, f"{self.root}/{name}")
        except BaseException as error:
            if stream is not None:
                with suppress(OSError, pa.ArrowException):
                    stream.close()
            with suppress(OSError, pa.ArrowException):
                self.filesystem.delete_file(temporary)
            if isinstance(error, (OSError, pa.ArrowException)):
                raise self._cannot_write(name, error) from None
            raise

    def _cannot_write(self, name: str, error: Exception) -> DataError:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return DataError(
                f"{self.root}: the disk is full. Complete files are kept: free some space, and the "
                f"same command resumes"
            )
        return DataError(f"{self.root}/{name}: cannot be written: {error}")

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a small file; None if there is no such file."""
        path = f"{self.root}/{name}"
        if self.filesystem.get_file_info(path).type != pafs.FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    def claim(self) -> dict[str, Any] | None:
        """Return the claim, the source and the settings of the content; None in an empty folder.

        Raises:
            DataError: If the claim is damaged, or the folder holds other files.
        """
        text = self.read(self.claim_name)
        if text is None:
            infos = self.filesystem.get_file_info(pafs.FileSelector(self.root))
            names = [i.base_name for i in infos if not i.base_name.startswith(".")]
            if names:
                raise DataError(
                    f"{self.root}: holds files that raysl {self.verb} did not write, such as "
                    f"{min(names)}; give a new or empty folder"
                )
            return None
        try:
            values: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{self.root}/{self.claim_name}: damaged: {error}; give a new folder"
            ) from None
        return values

    def refuse_others(self, old: Mapping[str, Any], new: Mapping[str, Any], *, holds: str) -> None:
        """Raise if the folder's content is of another source or of other settings.

        Args:
            old: Source and settings of the content, from the claim.
            new: Source and settings of this command.
            holds: Describes the folder's content, for the message.

        Raises:
            DataError: If they differ; the message lists each difference.
        """
        line = "{key}: {old!r} there, {new!r} here"
        changed = changes(old, new, compared=as_place, named=_KEY_NAMES, line=line)
        if changed:
            instead = "Give the same settings to resume, or another folder"
            raise DataError(refusal(self.uri, holds, changed, instead=instead))

    def write_claim(self, values: Mapping[str, Any]) -> None:
        """Write the claim."""
        with self.writing(self.claim_name) as stream:
            stream.write(json.dumps(values, indent=1).encode())

    def write_bad(
        self, bad: Sequence[Bad], *, name: Callable[[int], str], file: str = BAD_IMAGES
    ) -> None:
        """Write the list of bad images, one JSON object per line, sorted by row.

        Args:
            bad: The bad images, which are left out.
            name: Returns the readable name of a row.
            file: Name of the list's file.
        """
        with self.writing(file) as stream:
            for each in sorted(bad):
                line = {"row": each.row, "id": each.id, "name": name(each.row)}
                stream.write(json.dumps(line | {"reason": each.reason}).encode() + b"\n")

    def refuse_bad(
        self,
        bad: Sequence[Bad],
        *,
        num_images: int,
        most: float,
        name: Callable[[int], str],
        file: str = BAD_IMAGES,
    ) -> None:
        """Write the list of bad images and raise if there are too many.

        Args:
            bad: The bad images so far.
            num_images: Number of images of the source.
            most: Largest allowed share of bad images.
            name: Returns the readable name of a row.
            file: Name of the list's file.

        Raises:
            DataError: If their share is larger than ``most``.
        """
        if len(bad) <= most * num_images:
            return
        self.write_bad(bad, name=name, file=file)
        shown = "\n  ".join(f"{name(each.row)}: {each.reason}" for each in sorted(bad)[:_SHOWN_BAD])
        raise DataError(
            f"{len(bad):,} of {num_images:,} images are bad so far, more than max_bad_share="
            f"{most:g}; such as\n  {shown}\n{self.uri}/{file} lists them all. To leave them out, "
            f"set max_bad_share higher: the same command then resumes"
        )

    def check_room(
        self, needed: float, *, instead: str, remark: str = "", doubt: float = 0.0
    ) -> str | None:
        """Check that the output fits on a local disk, before hours of work.

        Args:
            needed: Estimated size of the output in bytes.
            instead: Settings that make the output smaller, for the message.
            remark: Explanation of the size, for the message.
            doubt: Relative error of the estimate.

        Returns:
            A warning if the output may not fit, else None.

        Raises:
            DataError: If the output does not fit.
        """
        if not self.is_local:
            return None
        free = shutil.disk_usage(self.root).free
        what = f"about {needed / _MIB:,.0f} MiB are needed, {free / _MIB:,.0f} MiB are free{remark}"
        if (1 - doubt) * needed > free:
            raise DataError(
                f"{self.root}: {what}; free some space, give another folder, or set {instead}"
            )
        return f"{self.root}: {what}; this may not suffice" if (1 + doubt) * needed > free else None

    def sweep(self, *, buckets: bool = False) -> None:
        """Delete partly written files of an earlier process, and all buckets if ``buckets``."""
        for below in ("", f"{BUCKETS}/"):
            for name in self.file_sizes(below):
                if name.startswith(".") and name != LOCK:
                    self.delete(below + name)
        if buckets:
            with suppress(OSError):
                self.filesystem.delete_dir(f"{self.root}/{BUCKETS}")

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{name}")
