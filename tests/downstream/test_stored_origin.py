"""Commands that start from a run in a store: what they store names the store, not a local copy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysl.cli import main
from raysl.config.yaml_text import to_yaml
from raysl.downstream.evaluation_config import load_evaluation
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


def test_an_evaluation_copies_the_run_to_a_disk_and_only_its_own(
    run: str, encoder: Path, tmp_path: Path, tiny_encoder: Callable[..., Path]
) -> None:
    for _ in range(2):  # the second finds the copy
        config, origin = load_evaluation(run, ["data.limit=100"], home=tmp_path)
    assert origin.folder == tmp_path / "runs" / "pre"
    assert origin.run == origin.folder
    assert config.data.source == "digits"
    assert encoder_digest(origin.encoder) == encoder_digest(encoder)
    tiny_encoder(seed=1).replace(origin.encoder)
    with pytest.raises(ConfigError, match="holds another encoder"):
        load_evaluation(run, [], home=tmp_path)


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


def test_a_sweep_into_a_store_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "simclr_temperature_batch", "output_dir=s3://bucket/runs"]) == 1
    assert "pretrain, finetune and distill also write" in capsys.readouterr().err
