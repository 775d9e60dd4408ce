"""`raysl embed` as a command: what it prints, what it returns, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main

Results = Callable[..., dict[str, Any]]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysl.embed.command.connect", lambda: pytest.fail("Ray was started"))


@pytest.mark.usefixtures("no_ray")
class TestWithoutRay:
    def test_says_what_was_embedded_what_was_left_out_and_what_comes_next(
        self,
        photos: Path,
        tiny_encoder: Callable[..., Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "my out"
        words = [str(photos), str(tiny_encoder().parent), str(out), "num_workers=0"]
        assert main(["embed", *words, "max_bad_share=0.05"]) == 0
        printed, said = capsys.readouterr()
        assert f"embedding 101 images from {photos}" in said
        assert "1, listed in " in printed
        assert (out / "_bad_images.jsonl").exists()
        assert "64 per image" in printed
        assert f"next      raysl search '{out}' --grid neighbours.png\n" in printed
        assert f"          raysl duplicates '{out}' --contact-sheet duplicates.png\n" in printed

    def test_the_same_command_again_has_nothing_to_do(
        self, tiny_encoder: Callable[..., Path], tmp_path: Path, results_of: Results
    ) -> None:
        encoder, out = tiny_encoder(), tmp_path / "out"
        first = results_of("embed", "digits", encoder, out, "limit=50", "num_workers=0")
        assert (first["images"], first["bad_images"], first["made"]) == (50, 0, 50)
        assert first["images_per_s"] > 0
        again = results_of("embed", "digits", encoder, out, "limit=50")
        assert (again["made"], again["complete_before"]) == (0, True)
        assert again["images_per_s"] is None
        same = ("images", "embed_dim", "shards", "bytes", "output")
        assert {key: again[key] for key in same} == {key: first[key] for key in same}

    def test_pixels_decoded_otherwise_than_in_training_are_named(
        self,
        tiny_encoder: Callable[..., Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        trained = {"intensity": None, "color_profile": "ignore", "pages": "refuse"}
        encoder = str(tiny_encoder(decoding=trained))
        words = ["digits", encoder, str(tmp_path / "out"), "limit=8", "num_workers=0"]
        assert main(["embed", *words]) == 0
        assert 'color_profile="convert" here, but the encoder' in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["embed", "digits", "PLACE", "OUT"], "no encoder there"),
            (["embed", "digits", "ENCODER", "OUT", "size_px=0"], "size_px: Input should be"),
            (["embed", "digits", "ENCODER", "OUT", "size=9"], "unknown key 'size'"),
            (["embed", "digits", "ENCODER", "OUT", "source=x"], "give the source once"),
            (["embed", "nowhere", "ENCODER", "OUT"], "nowhere"),
        ],
    )
    def test_a_mistake_is_one_message_and_status_one(
        self,
        words: list[str],
        text: str,
        tiny_encoder: Callable[..., Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        places = {
            "PLACE": str(tmp_path),
            "ENCODER": str(tiny_encoder()),
            "OUT": str(tmp_path / "out"),
        }
        assert main([places.get(word, word) for word in words]) == 1
        said = capsys.readouterr().err
        assert text in said
        assert "Traceback" not in said
        assert not (tmp_path / "out").exists()

    def test_other_settings_than_the_folders_are_refused_with_both_values(
        self,
        tiny_encoder: Callable[..., Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        words = ["digits", str(tiny_encoder()), str(tmp_path / "out"), "limit=8", "num_workers=0"]
        assert main(["embed", *words]) == 0
        assert main(["embed", *words, "size_px=12"]) == 1
        assert "size_px: 16 there, 12 here" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_embeds_on_ray(
    tiny_encoder: Callable[..., Path], tmp_path: Path, results_of: Results
) -> None:
    out = tmp_path / "out"
    results = results_of("embed", "digits", tiny_encoder(), out, "num_workers=1", "limit=300")
    assert results["images"] == results["made"] == 300
