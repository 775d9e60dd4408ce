"""`raysl import` as a command: where it writes, what it prints, what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.cli import main
from raysl.encoder.file import load_encoder, read_description

Results = Callable[..., dict[str, Any]]


def test_writes_beside_the_file_and_reports_the_network_and_its_layout(
    moco_file: Path, tmp_path: Path, results_of: Results
) -> None:
    results = results_of("import", moco_file, "backbone.stem=small", "image_size_px=32")
    assert results["encoder"] == str(tmp_path / "moco.encoder.safetensors")
    assert (results["layout"], results["backbone"]["stem"]) == ("moco", "small")
    assert "module.encoder_q." in results["taken"]
    assert results["image_size_px"] == 32
    assert results["embed_dim"] == 64
    expected = torch.load(moco_file)["state_dict"]["module.encoder_q.conv1.weight"]
    encoder = load_encoder(tmp_path / "moco.encoder.safetensors")
    assert torch.equal(next(iter(encoder.parameters())), expected)


def test_prints_what_it_assumed_and_what_sets_it_otherwise(
    moco_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my encoders"
    out.mkdir()
    assert main(["import", str(moco_file), "-o", str(out)]) == 0
    printed, said = capsys.readouterr()
    assert "assumed" in printed
    assert "to change an assumption: raysl import FILE SETTING=VALUE" in said
    assert "no code from the file was run" in said
    file = out / "encoder.safetensors"
    assert f"next      raysl evaluate '{file}' data.source=digits\n" in printed
    assert f"photos    raysl evaluate '{file}' data.source=FOLDER\n" in printed
    assert read_description(file)["imported"]["file"] == "moco.pth.tar"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-o", "moco.pth"], "ends with .safetensors"),
        (["--layout", "dino"], "holds no network of the layout dino; it holds: "),
        (["stem=small"], "unknown key 'stem'"),
        (["network=none"], "holds no network=none; it holds: "),
        (["image_size_px=0"], "image_size_px: Input should be greater than 0"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    words: list[str],
    text: str,
    moco_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["import", str(moco_file), *words]) == 1
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == [moco_file]


def test_does_not_write_over_the_file_itself(
    moco_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = moco_file.rename(tmp_path / "w.safetensors")
    assert main(["import", str(path), "-o", str(path)]) == 1
    assert "is the file to import; give another path" in capsys.readouterr().err


def test_a_layout_that_does_not_exist_is_a_usage_error(
    moco_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["import", str(moco_file), "--layout", "mocov9"])
    assert "invalid choice: 'mocov9'" in capsys.readouterr().err
