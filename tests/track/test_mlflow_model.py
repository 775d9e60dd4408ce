import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from raysl.cli import main
from raysl.encoder.file import save_encoder
from raysl.errors import ExportError
from raysl.folder.whole import write_json
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.track.mlflow_model import Registered, register_encoder, use_tracking_uri


def test_storing_an_encoder_leaves_no_address_behind_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with use_tracking_uri(f"sqlite:///{tmp_path}/one.db"):
        assert os.environ["MLFLOW_TRACKING_URI"].endswith("one.db")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    with use_tracking_uri(f"sqlite:///{tmp_path}/two.db"):
        pass
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://elsewhere"


ENCODER = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5)).eval()


def register(store: str, *, run_id: str | None = None, check: Any = lambda _: 0.0) -> Registered:
    return register_encoder(
        ENCODER,
        uri=store,
        name="photos",
        run_id=run_id,
        experiment="raysl",
        size_px=4,
        embed_dim=5,
        packages=["torch"],
        check=check,
    )


def test_an_encoder_becomes_versions_of_a_name_with_a_signature(store: str) -> None:
    images = torch.randn(3, 3, 4, 4)

    def check(model: Any) -> float:
        with torch.no_grad():
            return float((model(images) - ENCODER(images)).abs().max())

    first = register(store, check=check)
    again = register(store, run_id=first.run_id)
    assert (first.version, again.version, first.difference) == ("1", "2", 0.0)
    assert again.run_id == first.run_id
    versions = MlflowClient(store).search_model_versions("name='photos'")
    assert {version.run_id for version in versions} == {first.run_id}
    with use_tracking_uri(store):
        info = mlflow.models.get_model_info("models:/photos/1")
    assert info.signature.inputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 3, 4, 4)

    gone = register(store, run_id="0" * 32)  # somebody deleted it
    assert gone.run_id not in (first.run_id, "0" * 32)


def test_the_command_registers_below_the_run_that_trained_the_encoder(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"name": "resnet18", "stem": "cifar", "width": 0.125}
    encoder = build_backbone(BackboneConfig.model_validate(section))
    description = {"backbone": section, "image_size_px": 16}
    save_encoder(tmp_path / "encoder.safetensors", encoder, description=description)
    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("trained")).info.run_id
    write_json(tmp_path / "mlflow.json", {"run_id": run_id, "uri": store, "experiment": "trained"})
    # The address is that of the run.
    arguments = ["export", str(tmp_path), "--format", "mlflow", "--name", "command", "--json"]
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])["exports"]["mlflow"]
    assert (done["run_id"], done["version"]) == (run_id, "1")
    names: dict[str, Any] = {}
    with use_tracking_uri(store):
        exec("\n".join(done["usage"]), names)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](images), encoder.eval()(images))


def test_what_does_not_pass_the_check_gets_no_version(store: str) -> None:
    def check(_: Any) -> float:
        raise ExportError("differs by 1")

    before = len(MlflowClient(store).search_model_versions("name='photos'"))
    with pytest.raises(ExportError, match="differs by 1"):
        register(store, check=check)
    assert len(MlflowClient(store).search_model_versions("name='photos'")) == before


def test_a_store_that_takes_nothing_is_told_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ExportError, match="MLflow did not accept the model") as caught:
        register("http://ann:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)
