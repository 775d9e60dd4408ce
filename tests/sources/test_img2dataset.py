"""Tables of img2dataset: which they are, and what they say of failed downloads."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raysl.sources import img2dataset
from raysl.sources.img2dataset import download_notes

LOCAL = pafs.LocalFileSystem()
LOST = "HTTP Error 404: Not Found"


def _write(path: Path, status: list[str | None], errors: list[str | None] | None = None) -> str:
    keys = [f"{n:09}" for n in range(len(status))]
    columns: dict[str, Any] = {"url": ["u"] * len(status), "key": keys, "status": status}
    if errors is not None:
        columns["error_message"] = errors
    pq.write_table(pa.table(columns), path)
    return str(path)


class TestFailedRows:
    def test_counts_by_status_and_names_the_commonest_reasons(self, tmp_path: Path) -> None:
        good: list[str | None] = ["success"] * 5
        files = [
            _write(
                tmp_path / "0.parquet",
                [*good, "failed_to_download", "failed_to_download", "failed_to_resize"],
                [None] * 5 + [LOST, LOST, "Image\ndecoding error"],
            ),
            _write(
                tmp_path / "1.parquet",
                [*good, "failed_to_download", None],
                [None] * 5 + ["x", None],
            ),
        ]
        assert download_notes(LOCAL, files) == (
            "10 of 15 rows of the metadata downloaded, 5 not (failed_to_download 3, "
            "failed_to_resize 1, no status 1); most often: HTTP Error 404: Not Found 2, Image "
            "decoding error 1, x 1",
        )

    def test_without_failures_it_is_short(self, tmp_path: Path) -> None:
        file = _write(tmp_path / "0.parquet", ["success"] * 4)
        assert download_notes(LOCAL, [file]) == ("4 of 4 rows of the metadata downloaded",)

    def test_files_without_the_column_or_damaged_are_counted(self, tmp_path: Path) -> None:
        files = [_write(tmp_path / "0.parquet", ["success", "failed_to_resize"])]
        pq.write_table(pa.table({"url": ["u"]}), tmp_path / "1.parquet")
        (tmp_path / "2.parquet").write_bytes(b"PAR1 cut short")
        (tmp_path / "3.parquet").write_bytes(b"")
        nested = pa.table({"status": [["success"]], "url": ["u"], "key": ["1"]})
        pq.write_table(nested, tmp_path / "4.parquet")
        files += [str(tmp_path / f"{n}.parquet") for n in range(1, 6)]
        assert download_notes(LOCAL, files) == (
            "1 of 2 rows of the metadata downloaded, 1 not (failed_to_resize 1)",
            "5 Parquet files of 6 beside the images cannot be read or have no column 'status'",
        )

    def test_of_many_files_an_even_sample_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(img2dataset, "_MOST_FILES", 4)
        files = [_write(tmp_path / f"{n}.parquet", ["success"] * (n + 1)) for n in range(12)]
        assert download_notes(LOCAL, files) == (
            "22 of 22 rows of the metadata downloaded (4 of the 12 tables looked at)",
        )

    def test_of_none_there_is_nothing_to_say(self) -> None:
        assert download_notes(LOCAL, []) == ()
