"""Which members of a tar shard are images, and which label belongs to which."""

import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from raysl.errors import DataError
from raysl.sources import tar_index, tar_notes
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig
from raysl.sources.tar import TarSource

Members = Sequence[tuple[str, bytes]]


def _write(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def _open(path: Path, **settings: Any) -> TarSource:
    config = DataConfig(source=str(path), **settings)
    opened = open_source(config, data=config)
    assert isinstance(opened, TarSource)
    return opened


def _read(source: TarSource) -> list[bytes]:
    return [bytes(data) for data in source.read(range(int(source.group_sizes.sum())))]


def _classes(source: TarSource) -> list[str | None]:
    labels = source.labels()
    assert labels is not None
    return [source.class_names[label] if label >= 0 else None for label in labels]


class TestOrder:
    @pytest.mark.parametrize("seed", range(4))
    def test_labels_are_found_wherever_they_lie(self, seed: int, tmp_path: Path) -> None:
        members = [(f"{n:03}.jpg", b"%d" % n) for n in range(30)]
        members += [(f"{n:03}.cls", b"%d" % (n % 3)) for n in range(30)]
        if seed:
            members = [members[n] for n in np.random.default_rng(seed).permutation(60)]
        source = _open(_write(tmp_path / "a.tar", members))
        assert _classes(source) == [str(int(image) % 3) for image in _read(source)]
        images = [content for name, content in members if name.endswith("jpg")]
        assert _read(source) == images
        assert source.notes == ()

    def test_a_cls_goes_before_a_json_in_either_order(self, tmp_path: Path) -> None:
        members = [
            ("1.cls", b"cat"),
            ("2.json", b'{"label": "horse"}'),
            ("1.jpg", b""),
            ("1.json", b'{"label": "horse"}'),
            ("2.jpg", b""),
            ("2.cls", b"dog"),
        ]
        assert _classes(_open(_write(tmp_path / "a.tar", members))) == ["cat", "dog"]


class TestRepeated:
    def test_the_last_of_each_counts_as_when_tar_unpacks_them(self, tmp_path: Path) -> None:
        members = [
            ("1.jpg", b"old"),
            ("1.cls", b"cat"),
            ("2.jpg", b"two"),
            ("./1.jpg", b"new"),
            ("1.cls", b"dog"),
            ("1.jpg", b"newest"),
        ]
        path = _write(tmp_path / "d.tar", members)
        source = _open(path)
        assert _read(source) == [b"two", b"newest"]
        assert _classes(source) == [None, "dog"]
        assert source.notes == ("3 members occur twice in d.tar; the last of each is used",)
        with tarfile.open(path) as shard:
            shard.extractall(tmp_path / "unpacked", filter="data")
        assert (tmp_path / "unpacked" / "1.jpg").read_bytes() == b"newest"

    def test_two_different_images_of_a_sample_are_an_error_that_names_both(
        self, tmp_path: Path
    ) -> None:
        path = _write(tmp_path / "a.tar", [("a.jpg", b"photo"), ("b.jpg", b""), ("a.png", b"copy")])
        message = r"'a' holds several images \(a\.jpg, a\.png\); set data\.image_column to the su"
        with pytest.raises(DataError, match=message):
            _open(path)
        assert _read(_open(path, image_column="png")) == [b"copy"]
        assert _read(_open(path, image_column=".JPG")) == [b"photo", b""]

    def test_suffixes_that_differ_in_case_are_told_apart_by_the_setting(
        self, tmp_path: Path
    ) -> None:
        path = _write(tmp_path / "a.tar", [("a.jpg", b"small"), ("a.JPG", b"large")])
        with pytest.raises(DataError, match=r"several images \(a\.jpg, a\.JPG\)"):
            _open(path)
        assert _read(_open(path, image_column="JPG")) == [b"large"]
        assert _read(_open(path, image_column="jpg")) == [b"small"]


class TestDots:
    def test_the_only_image_of_a_sample_may_have_a_dotted_name(self, tmp_path: Path) -> None:
        members = [
            ("cat.v2.jpg", b"image"),
            ("cat.cls", b"c"),
            ("cat.meta.json", b'{"label": "no"}'),
            ("dog.v2.jpg", b"other"),
            ("dog.v2.cls", b"d"),
        ]
        source = _open(_write(tmp_path / "a.tar", members))
        assert _read(source) == [b"image", b"other"]
        assert _classes(source) == ["c", "d"]
        assert source.notes == ()

    def test_a_plain_suffix_wins_and_the_others_are_counted_with_the_setting_that_takes_them(
        self, tmp_path: Path
    ) -> None:
        members = [(f"{n}.{end}", end.encode()) for n in range(3) for end in ("jpg", "v2.jpg")]
        members += [("0.seg.png", b"mask"), ("0.cls", b"c"), ("1.seg.cls", b"no")]
        path = _write(tmp_path / "a.tar", members)
        source = _open(path)
        assert _read(source) == [b"jpg"] * 3
        assert _classes(source) == ["c", None, None]
        assert source.notes == (
            "4 images left out beside another of the same sample: v2.jpg (3), seg.png (1); "
            "data.image_column=v2.jpg uses those instead",
        )
        chosen = _open(path, image_column="v2.jpg")
        assert _read(chosen) == [b"v2.jpg"] * 3
        assert chosen.notes == ()
        masks = _open(path, image_column="seg.png")
        assert _read(masks) == [b"mask"]
        assert masks.notes == ("2 samples have no image: members end in jpg (2)",)

    def test_several_dotted_names_of_a_folder_are_images_of_their_own(self, tmp_path: Path) -> None:
        members = [
            ("day/photo.2021.05.jpg", b"may"),
            ("day/photo.2021.06.jpg", b"june"),
            ("day/photo.2021.05.cls", b"spring"),
            ("day/photo.json", b'{"label": "summer"}'),
        ]
        source = _open(_write(tmp_path / "a.tar", members))
        assert _read(source) == [b"may", b"june"]
        assert _classes(source) == ["spring", "summer"]
        assert source.row_id(1) == "a.tar/day/photo.2021.06.jpg"
        assert source.notes == (
            "2 images share their names up to the first dot with others but are used as separate "
            "images: 2021.05.jpg (1), 2021.06.jpg (1)",
        )

    def test_masks_that_are_taken_for_images_are_said_with_the_setting_against_it(
        self, tmp_path: Path
    ) -> None:
        ends = ("image.png", "mask.png")
        path = _write(tmp_path / "a.tar", [(f"{n}.{end}", b"") for n in range(3) for end in ends])
        source = _open(path)
        assert source.notes == (
            "6 images share their names up to the first dot with others but are used as separate "
            "images: image.png (3), mask.png (3); data.image_column=image.png uses one per sample",
        )
        assert len(_read(_open(path, image_column="image.png"))) == 3

    def test_names_with_numbers_in_them_are_not_called_columns(self, tmp_path: Path) -> None:
        names = [f"{kind}.{n}.jpg" for kind in ("cat", "dog") for n in range(2)]
        assert _open(_write(tmp_path / "a.tar", [(name, b"") for name in names])).notes == (
            "4 images share their names up to the first dot with others but are used as separate "
            "images: 0.jpg (2), 1.jpg (2)",
        )

    def test_many_different_names_are_counted_in_little_memory(self, tmp_path: Path) -> None:
        members = [(f"p.{n:03}.jpg", b"") for n in range(40)]
        path = _write(tmp_path / "a.tar", members)
        config = DataConfig(source=str(path))
        found = tar_index.index_shard(pafs.LocalFileSystem(), str(path), config)
        assert len(found.tally.one_by_one) == 11
        assert found.tally.one_by_one.total() == 40
        assert _open(path).notes == (
            "40 images share their names up to the first dot with others but are used as separate "
            "images: 000.jpg (1), 001.jpg (1), 002.jpg (1), others (37)",
        )


class TestLeftOut:
    def test_samples_without_an_image_are_counted_by_what_they_hold(self, tmp_path: Path) -> None:
        members = [(f"v{n}.{end}", b"") for n in range(12) for end in ("mp4", "json", "txt")]
        members += [("only.cls", b"1"), ("README", b""), ("ok.jpg", b"")]
        source = _open(_write(tmp_path / "a.tar", members))
        assert source.notes == (
            "14 samples have no image: members end in mp4 (12), cls (1), no suffix (1)",
            "12 .json members without a label: not JSON",
        )

    def test_hidden_images_and_links_are_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as shard:
            for name, kind in (
                ("x.jpg", tarfile.REGTYPE),
                ("._x.jpg", tarfile.REGTYPE),
                ("y.jpg", tarfile.LNKTYPE),
                ("z.jpg", tarfile.SYMTYPE),
                ("notes", tarfile.SYMTYPE),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "x.jpg"
                shard.addfile(member)
        assert _open(path).notes == (
            "1 image left out: names that begin with a dot",
            "2 images left out: links; tar writes files instead with --dereference "
            "--hard-dereference",
        )

    def test_formats_whose_library_is_missing_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for room in (tar_index, tar_notes):
            monkeypatch.setattr(
                room, "missing_package", lambda suffix: "HEIC" if suffix == ".heic" else None
            )
        path = _write(tmp_path / "a.tar", [("1.heic", b""), ("2.jfif", b"image")])
        source = _open(path)
        assert _read(source) == [b"image"]
        assert source.notes == (
            "1 sample has no image: members end in heic (1); pip install 'raysl[formats]' "
            "installs libraries for some of them",
        )

    def test_without_any_image_the_error_says_what_lies_there(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.tar", [("1.mp4", b""), ("2.npy", b"")])
        with pytest.raises(
            DataError,
            match=r"no images in the 1 tar shard: no member ends in the suffix of an image; "
            r".*; 2 samples have no image: members end in mp4 \(1\), npy \(1\)$",
        ):
            _open(path)


class TestLabels:
    def test_ids_are_dense_classes_and_negative_ones_are_no_label(self, tmp_path: Path) -> None:
        texts = (b"20000", b"17", b"-1", b"20000\n", b"17")
        members = [(f"{n}.{end}", text) for n, text in enumerate(texts) for end in ("jpg", "cls")]
        source = _open(_write(tmp_path / "a.tar", members))
        assert _classes(source) == ["20000", "17", None, "20000", "17"]
        assert source.class_names == ["17", "20000"]

    @pytest.mark.parametrize(
        ("values", "note"),
        [
            ([[1, 2], [2]], r"data\.label_column=label holds list<.*>: several labels per image, "),
            ([{"id": 1}, {"id": 2}], r"data\.label_column=label holds list<"),
            ([0.5, 3], r"data\.label_column=label holds measurements \(0\.5\), not classes; the "),
        ],
    )
    def test_what_is_no_class_is_named_and_leaves_no_labels(
        self, values: list[Any], note: str, tmp_path: Path
    ) -> None:
        members = []
        for n, value in enumerate(values):
            members += [(f"{n}.jpg", b""), (f"{n}.json", json.dumps({"label": value}).encode())]
        source = _open(_write(tmp_path / "a.tar", members))
        assert source.labels() is None
        assert source.class_names == []
        (said,) = source.notes
        assert re.match(note, said)

    @pytest.mark.parametrize(
        ("values", "classes"),
        [
            ([3.0, 17.0, None], ["3", "17", None]),
            ([True, False, True], ["True", "False", "True"]),
            ([2**70, "a", 5], [str(2**70), "a", "5"]),
        ],
    )
    def test_values_of_json_become_classes(
        self, values: list[Any], classes: list[str | None], tmp_path: Path
    ) -> None:
        members = []
        for n, value in enumerate(values):
            members += [(f"{n}.jpg", b""), (f"{n}.json", json.dumps({"label": value}).encode())]
        assert _classes(_open(_write(tmp_path / "a.tar", members))) == classes

    def test_a_key_that_no_json_has_is_said(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "a.tar", [("1.jpg", b""), ("1.json", b'{"label": 1}')])
        source = _open(path, label_column="lable")
        assert source.labels() is None
        assert source.notes == ("data.label_column=lable: no .json member has that key",)
