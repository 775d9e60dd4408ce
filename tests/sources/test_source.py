import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from raysl.augment.pipeline import View
from raysl.augment.recipes import CustomViews, MoCoV1Views
from raysl.config.load import validate
from raysl.config.yaml_text import parse_yaml, to_yaml
from raysl.errors import ConfigError, DataError
from raysl.sources.source import ArraySource, DataConfig, SourceConfig, digest
from raysl.sources.storage import resolve


def _images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 7, 3), dtype=np.uint8)


class TestArraySource:
    def test_reads_rows_in_the_order_asked_for(self) -> None:
        images = _images()
        read = ArraySource("toy", images).read([3, 0, 3])
        np.testing.assert_array_equal(np.stack(read), images[[3, 0, 3]])

    def test_is_one_group_without_a_window(self) -> None:
        source = ArraySource("toy", _images())
        assert source.group_sizes.tolist() == [5]
        assert source.window_size is None

    def test_names_a_row(self) -> None:
        assert ArraySource("toy", _images()).where(3) == "toy image 3"

    def test_passes_labels_and_their_names_on(self) -> None:
        source = ArraySource("toy", _images(2), np.array([1, -1]), ["cat", "dog"])
        labels = source.labels()
        assert labels is not None
        assert labels.tolist() == [1, -1]
        assert source.class_names == ["cat", "dog"]
        assert ArraySource("toy", _images()).labels() is None

    def test_fingerprint_changes_with_a_single_pixel_and_not_with_the_name(self) -> None:
        images = _images()
        before = ArraySource("a", images).fingerprint
        assert ArraySource("b", images.copy()).fingerprint == before
        images[4, 5, 6, 2] ^= 1
        assert ArraySource("a", images).fingerprint != before

    def test_fingerprint_does_not_depend_on_the_memory_layout(self) -> None:
        images = _images()
        turned = np.asfortranarray(images)
        assert ArraySource("a", turned).fingerprint == ArraySource("a", images).fingerprint

    def test_survives_pickling(self) -> None:
        source = ArraySource("toy", _images(2), np.array([1, 0]), ["cat", "dog"])
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(np.stack(copy.read([1, 0])), np.stack(source.read([1, 0])))
        assert copy.fingerprint == source.fingerprint
        assert copy.labels().tolist() == [1, 0]
        assert copy.class_names == ["cat", "dog"]


class TestDigest:
    def test_is_16_hex_digits_and_text_counts_as_utf8(self) -> None:
        assert len(digest("a")) == 16
        int(digest("a"), 16)
        assert digest("\u00fc") == digest("\u00fc".encode()) == digest(memoryview(b"\xc3\xbc"))

    def test_changes_with_every_part(self) -> None:
        assert len({digest("a\n", "b\n"), digest("a\n"), digest("b\n", "a\n"), digest()}) == 4


class TestResolve:
    def test_a_path_is_local_and_absolute(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        filesystem, path = resolve("pictures/cats")
        assert isinstance(filesystem, pafs.LocalFileSystem)
        assert path == str(tmp_path / "pictures" / "cats")

    def test_a_tilde_is_the_home_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve("~/cats")[1] == str(tmp_path / "cats")

    def test_a_file_uri_is_its_path(self, tmp_path: Path) -> None:
        filesystem, path = resolve(f"file://{tmp_path}/cats")
        assert isinstance(filesystem, pafs.LocalFileSystem)
        assert path == str(tmp_path / "cats")

    @pytest.mark.parametrize("uri", ["nope://bucket/cats", "file://host/cats"])
    def test_a_uri_that_is_not_known_is_an_error_that_names_it(self, uri: str) -> None:
        with pytest.raises(DataError, match=rf"^data\.source={uri}: "):
            resolve(uri)


class TestConfigs:
    @pytest.mark.parametrize(
        "config",
        [
            DataConfig(source="digits"),
            DataConfig(source="a", views=MoCoV1Views(size_px=32), limit=3, mean=(0.0, 0.5, 1.0)),
            DataConfig(source="a", views=CustomViews(kinds=(View(), View(count=8, size_px=96)))),
            DataConfig(source="s3://b/c", image_column="jpg", label_column="1e3"),
        ],
    )
    def test_a_dump_loads_again(self, config: DataConfig) -> None:
        values = parse_yaml(to_yaml(config.model_dump(mode="json")), where="dump")
        assert validate(DataConfig, values, where="dump") == config

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "source: missing; it has no default"),
            ({"source": 3}, "source: takes text, but 3 without quotes is a number"),
            ({"source": "a", "limit": 0}, "limit: Input should be greater than 0, got 0"),
            ({"source": "a", "limits": 3}, "unknown key 'limits'; did you mean 'limit'"),
            ({"source": "a", "std": [0.2, 0.0, 0.2]}, r"std\.1: .*greater than 0, got 0\.0"),
            ({"source": "a", "mean": [1.5, 0, 0]}, r"mean\.0: .*less than or equal to 1, got 1\.5"),
            ({"source": "a", "mean": [0.5]}, r"mean\.1: missing"),
            ({"source": "a", "shuffle_window_mib": 0}, "shuffle_window_mib: .*got 0"),
            ({"source": "a", "views": {"recipe": "simcrl"}}, "did you mean 'simclr'"),
        ],
    )
    def test_a_bad_key_is_named(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            validate(DataConfig, given, where="x")

    def test_the_sections_for_evaluation_have_no_views(self) -> None:
        with pytest.raises(ConfigError, match="unknown key 'views'"):
            validate(SourceConfig, {"source": "a", "views": {}}, where="x")
