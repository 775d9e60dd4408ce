"""Commands that start from a run in a store: what they store names the store, not a local copy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysl.cli import main
from raysl.config.yaml_text import to_yaml
from raysl.downstream.evaluation_config import evaluation_place, load_evaluation
from raysl.errors import ConfigError
from raysl.evaluate.embedding import encoder_digest
from raysl.methods.base import TrainingSet
from raysl.run.build import build_method
from raysl.run.places import with_absolute_files
from raysl.run.recipe import load_run
from raysl.store.objects import Store
from raysl.store.scratch import scratch_base


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def encoder(tiny_encoder: Callable[..., Path]) -> Path:
    return tiny_encoder()


@pytest.fixture
def run(run_yaml: Callable[[str], Path], encoder: Path, tmp_path: Path) -> str:
    """The address of a finished run."""
    place = f"memory://{tmp_path.name}/runs"
    store = Store(f"{place}/pre")
    config = load_run(run_yaml("pre"), [f"output_dir={place}"])
    store.put("config.yaml", to_yaml(config.model_dump(mode="json")).encode())
    store.put_file("encoder.safetensors", encoder)
    return store.address


@pytest.mark.parametrize("file", ["", "/encoder.safetensors"])
def test_fine_tuning_goes_to_the_store_and_names_its_encoder_there(
    file: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def train_run(config: Any, **_: Any) -> dict[str, Any]:
        asked.append(config)
        return {}

    monkeypatch.setattr("raysl.downstream.finetune_command.train_run", train_run)
    assert main(["finetune", run + file, "data.labels.fraction=0.5"]) == 0
    (config,) = asked
    assert config.output_dir == run.rpartition("/")[0]
    assert config.backbone.weights == f"{run}/encoder.safetensors"
    assert str(scratch_base()) not in str(config.model_dump())
    assert with_absolute_files(config, Path()).backbone.weights == config.backbone.weights


def test_a_network_starts_from_weights_in_a_store(
    run: str, encoder: Path, run_yaml: Callable[[str], Path], tmp_path: Path
) -> None:
    config = load_run(run_yaml("b"), [f"backbone.weights={run}"])
    data = TrainingSet(
        num_images=64,
        global_batch_size=32,
        view_sizes_px=(32, 32),
        class_counts=None,
        class_names=(),
        mean=config.data.mean,
        std=config.data.std,
    )
    built = build_method(config, data, device=torch.device("cpu"))
    state = built.encoder.net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in load_file(encoder).items())


@pytest.mark.parametrize(
    ("file", "overrides", "folder"),
    [
        ("", [], "{run}"),
        ("/encoder.safetensors", [], "{run}"),
        ("", ["output_dir=memory://else/where"], "memory://else/where/pre"),
    ],
)
def test_an_evaluation_of_a_run_in_a_store_belongs_there(
    run: str, encoder: Path, tmp_path: Path, file: str, overrides: list[str], folder: str
) -> None:
    config, origin = load_evaluation(run + file, ["data.limit=100", *overrides], home=tmp_path)
    assert origin.folder == folder.format(run=run)
    assert origin.place == f"{run}/encoder.safetensors"
    assert origin.run is not None
    assert (origin.run / "config.yaml").exists()
    assert config.data.source == "digits"
    assert encoder_digest(origin.encoder) == encoder_digest(encoder)
    assert evaluation_place(config, origin) == f"{origin.folder}/evaluations/digits"


def test_an_encoder_on_a_disk_goes_to_the_store_of_its_results_and_only_it(
    encoder: Path, tmp_path: Path, tiny_encoder: Callable[..., Path]
) -> None:
    given = [f"output_dir=memory://{tmp_path.name}/results", "data.source=digits"]
    for _ in range(2):  # the second finds it
        _, origin = load_evaluation(str(encoder), given, home=tmp_path)
    assert origin.place == f"memory://{tmp_path.name}/results/encoder/encoder.safetensors"
    assert encoder_digest(origin.encoder) == encoder_digest(encoder)
    tiny_encoder(seed=1)
    with pytest.raises(ConfigError, match="holds another encoder"):
        load_evaluation(str(encoder), given, home=tmp_path)


def test_embeddings_name_their_encoder_in_the_store(run: str, tmp_path: Path) -> None:
    assert main(["embed", "digits", run, "out", "limit=8", "num_workers=0"]) == 0
    records = [path.read_text() for path in (tmp_path / "out").rglob("*.json")]
    assert any(run in text for text in records)
    assert not any(str(scratch_base()) in text for text in records)


def test_an_export_of_a_run_in_a_store_needs_a_folder(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", run, "--format", "torch_export"]) == 1
    assert "-o FOLDER" in capsys.readouterr().err


def test_a_checkpoint_to_import_is_a_file_of_this_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["import", "s3://bucket/checkpoint.pth"]) == 1
    assert "backbone.weights=s3://bucket/checkpoint.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "simclr_temperature_batch"],
        ["pipeline", "simclr_v2_cifar10"],
        ["evaluate", "resnet18", "data.source=digits", "features.size_px=16"],
    ],
    ids=lambda words: words[0],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "output_dir=s3://key:hidden@bucket/runs"]) == 1
    error = capsys.readouterr().err
    assert "an address must hold neither a password nor settings" in error
    assert "hidden" not in error
