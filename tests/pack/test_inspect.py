"""What a look at a source finds, and what it advises."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from raysl.pack.inspect import Sample, advise, draw_sample, inspect, pack_speedup, summarise
from raysl.sources.open import open_source
from raysl.sources.pixels import Bits
from raysl.sources.source import ArraySource, DataConfig, Source


def jpeg(number: int, *, height: int = 30, width: int = 40, **options: Any) -> bytes:
    rng = np.random.default_rng(number)
    pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width, height))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", **options)
    return stream.getvalue()


def encoded(kind: str, pixels: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def write(root: Path, images: dict[str, bytes]) -> Source:
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    config = DataConfig(source=str(root))
    return open_source(config, data=config)


def grouped(path: Path, *, num_images: int, group: int) -> Source:
    images = [jpeg(number, height=8, width=8) for number in range(num_images)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=group)
    config = DataConfig(source=str(path), shuffle_window_mib=1)
    return open_source(config, data=config)


def look(source: Source, *, max_megapixels: float = 100.0, threads: int = 2) -> dict[str, Any]:
    sample = draw_sample(source, count=None, seed=0)
    counted: list[int] = []
    facts = inspect(
        source,
        sample,
        max_megapixels=max_megapixels,
        num_threads=threads,
        advance=counted.append,
    )
    assert sum(counted) == len(facts) == int(source.group_sizes.sum())
    return summarise(source, facts, cores=threads)


def rows_of(sample: Sample) -> list[int]:
    return [int(row) for chunk in sample.chunks for row in chunk]


class TestDrawSample:
    def test_takes_every_row_in_order_if_asked_or_if_there_are_few(self, tmp_path: Path) -> None:
        source = grouped(tmp_path / "x.parquet", num_images=50, group=7)
        for count in (None, 50, 99):
            sample = draw_sample(source, count=count, seed=0)
            assert rows_of(sample) == list(range(50))
            assert sample.text == ""

    def test_draws_different_rows_evenly_and_says_so(self) -> None:
        source = ArraySource("x", np.zeros((1000, 2, 2), np.uint8))
        sample = draw_sample(source, count=200, seed=0)
        rows = rows_of(sample)
        assert len(set(rows)) == 200
        assert 70 < sum(row < 500 for row in rows) < 130
        assert sample.text == "200 of 1,000 images drawn evenly at random"
        assert rows_of(draw_sample(source, count=200, seed=1)) != rows

    def test_reads_only_some_groups_of_a_large_grouped_source(self, tmp_path: Path) -> None:
        source = grouped(tmp_path / "x.parquet", num_images=800, group=8)
        sample = draw_sample(source, count=128, seed=0)
        rows = rows_of(sample)
        assert len(rows) == len(set(rows)) == 128
        assert len({row // 8 for row in rows}) == 64
        assert all(len({int(row) // 8 for row in chunk}) == 1 for chunk in sample.chunks)
        assert "from 64 of 100 groups" in sample.text


class TestSummarise:
    def test_counts_formats_traits_sizes_and_classes(self, tmp_path: Path) -> None:
        png = cv2.imencode(".png", np.zeros((50, 20, 4), np.uint8))[1].tobytes()
        exif = Image.Exif()
        exif[274] = 6
        images = {f"a/{n}.jpg": jpeg(n) for n in range(6)}
        images |= {"b/0.jpg": jpeg(7, exif=exif), "b/1.jpg": jpeg(8, progressive=True)}
        found = look(write(tmp_path / "images", images | {"b/2.png": png}))
        assert found["formats"] == {"jpeg": 8, "png": 1}
        assert found["traits"] == {"alpha": 1, "turned by EXIF": 1, "progressive": 1}
        assert found["width"] == {"min": 20, "median": 40.0, "max": 40}
        assert found["height"] == {"min": 30, "median": 30.0, "max": 50}
        assert found["short_side"] == {"min": 20, "median": 30.0, "max": 30}
        assert found["classes"] == {"count": 2, "unlabelled": 0, "sizes": {"a": 6, "b": 3}}
        assert found["total_bytes"] == sum(map(len, images.values())) + len(png)
        assert found["encoded_bytes"]["min"] == min(map(len, [*images.values(), png]))
        assert found["decoded_images_per_s"] > 0
        assert found["epoch_s"] == pytest.approx(9 / found["decoded_images_per_s"])

    def test_counts_turns_profiles_depth_floats_and_pages(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[274] = 6
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        deep = np.full((9, 9), 60_000, np.uint16)
        images = {
            "a.jpg": jpeg(1, icc_profile=profile),
            "b.jpg": jpeg(2, icc_profile=b"none"),
            "c.avif": encoded("AVIF", np.zeros((9, 20, 3), np.uint8), exif=exif),
            "d.png": encoded("PNG", deep),
            "e.tif": encoded("TIFF", np.ones((9, 9), np.float32)),
            "f.tif": encoded(
                "TIFF",
                np.zeros((9, 9), np.uint8),
                save_all=True,
                append_images=[Image.new("L", (9, 9))],
            ),
        }
        found = look(write(tmp_path / "images", images))
        assert found["traits"] == {
            "grey": 3,
            "more than 8 bits": 2,
            "floating point": 1,
            "several pages": 1,
            "turned by irot or imir": 1,
            "profile sRGB built-in": 1,
            "profile broken": 1,
        }
        assert ["pages" in bad["reason"] for bad in found["broken"]] == [True]

    def test_names_broken_images_and_why(self, tmp_path: Path) -> None:
        images = {f"{n}.jpg": jpeg(n) for n in range(4)}
        images |= {"cut.jpg": jpeg(9)[:-100], "empty.jpg": b"", "page.jpg": b"<html>"}
        images["huge.jpg"] = jpeg(10, height=200, width=200)
        found = look(write(tmp_path / "images", images), max_megapixels=0.01)
        reasons = {Path(bad["name"]).name: bad["reason"] for bad in found["broken"]}
        assert sorted(reasons) == ["cut.jpg", "empty.jpg", "huge.jpg", "page.jpg"]
        assert reasons["cut.jpg"].startswith("damaged")
        assert reasons["huge.jpg"] == "more pixels than max_megapixels"
        assert found["width"] == {"min": 40, "median": 40.0, "max": 40}

    def test_a_file_that_cannot_be_read_is_one_broken_image(self, tmp_path: Path) -> None:
        source = write(tmp_path / "images", {f"{n}.jpg": jpeg(n) for n in range(5)})
        (tmp_path / "images" / "3.jpg").unlink()
        (tmp_path / "images" / "3.jpg").mkdir()
        found = look(source)
        assert [Path(bad["name"]).name for bad in found["broken"]] == ["3.jpg"]
        assert "cannot be read" in found["broken"][0]["reason"]

    def test_names_images_with_the_same_content(self, tmp_path: Path) -> None:
        images = {f"{n}.jpg": jpeg(n % 5) for n in range(7)}
        found = look(write(tmp_path / "images", images | {"e1.jpg": b"", "e2.jpg": b""}))
        assert found["duplicates"] == 2
        names = [[Path(name).name for name in same] for same in found["duplicate_names"]]
        assert names == [["0.jpg", "5.jpg"], ["1.jpg", "6.jpg"]]

    def test_pixels_in_memory_have_no_format_and_cost_nothing_to_decode(self) -> None:
        pixels = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
        found = look(ArraySource("x", pixels, np.array([0, 1, -1]), ["zero", "one"]))
        assert found["formats"] == {"pixels": 3}
        assert found["decoded_images_per_s"] is None
        assert found["classes"]["unlabelled"] == 1
        assert found["duplicates"] == 0

    def test_all_images_broken_is_no_error(self, tmp_path: Path) -> None:
        found = look(write(tmp_path / "images", {"a.jpg": b"x", "b.jpg": b""}))
        assert len(found["broken"]) == 2
        assert found["width"] is None
        assert found["epoch_s"] is None

    def test_says_the_same_whatever_the_number_of_threads(self, tmp_path: Path) -> None:
        source = grouped(tmp_path / "x.parquet", num_images=100, group=9)
        found = [look(source, threads=threads) for threads in (1, 4)]
        for values in found:
            del values["decoded_images_per_s"], values["epoch_s"]
        assert found[0] == found[1]


class TestAdvise:
    def advice(self, source: Source) -> str:
        facts = inspect(
            source,
            draw_sample(source, count=None, seed=0),
            max_megapixels=100,
            num_threads=1,
            advance=lambda _: None,
        )
        speedup = pack_speedup(source, facts)
        summary = summarise(source, facts, cores=1)
        return " ".join(advise(source, summary, speedup=speedup, words=[source.name]))

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ([jpeg(n, height=1024, width=1280) for n in range(3)], "short_side_px=256` makes"),
            ([jpeg(1)] * 3, "2 images are copies of others"),
            ([jpeg(1), jpeg(2), b""], "33.3% of the images are bad"),
            ([jpeg(1), jpeg(2)], "2 images are few"),
            ([jpeg(1), jpeg(2)], "The images are small (30 px)"),
            ([jpeg(1), jpeg(2)], "There are no labels"),
        ],
    )
    def test_says_what_to_do(self, given: Sequence[bytes], words: str, tmp_path: Path) -> None:
        images = {f"{number}.jpg": data for number, data in enumerate(given)}
        assert words in self.advice(write(tmp_path / "images", images))

    def test_says_that_twelve_bits_in_sixteen_are_dark_and_how_to_set_the_range(
        self, tmp_path: Path
    ) -> None:
        values = np.linspace(100, 4000, 64 * 64).reshape(64, 64).astype(np.uint16)
        images = {f"{n}.png": encoded("PNG", values + n) for n in range(3)}
        said = self.advice(write(tmp_path / "images", images))
        assert "3 of 3 images of more than 8 bits use little of their range" in said
        assert "the highest value seen is 4,002 of 65,535" in said
        assert "nearly dark (no level above 15 of 255)" in said
        assert "data.intensity={bits: 12}" in said

    def test_says_nothing_of_a_range_that_is_set_or_in_use(self, tmp_path: Path) -> None:
        full = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
        source = write(tmp_path / "full", {f"{n}.png": encoded("PNG", full) for n in range(3)})
        assert "range" not in self.advice(source)
        dark = {f"{n}.png": encoded("PNG", full // 16) for n in range(3)}
        write(tmp_path / "dark", dark)
        config = DataConfig(source=str(tmp_path / "dark"), intensity=Bits(bits=12))
        assert "range" not in self.advice(open_source(config, data=config))

    def test_says_which_range_floats_have(self, tmp_path: Path) -> None:
        values = np.linspace(-3, 700, 64 * 64).reshape(64, 64).astype(np.float32)
        images = {f"{n}.tif": encoded("TIFF", values) for n in range(2)}
        said = self.advice(write(tmp_path / "images", images))
        assert "100.0% of the images are bad" in said
        assert "from -3 to 700" in said
        assert "data.intensity=[-3, 700]" in said

    def test_small_images_need_no_packing(self, tmp_path: Path) -> None:
        source = write(tmp_path / "images", {"0.jpg": jpeg(1), "1.jpg": jpeg(2)})
        assert "short_side_px" not in self.advice(source)
