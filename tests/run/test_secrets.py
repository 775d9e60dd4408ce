"""Secrets of the command line and environment stay there: in no file, no line, not sent."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.cli import main
from raysl.errors import ConfigError, hide_passwords
from raysl.folder.whole import read_json
from raysl.run.recipe import load_run
from raysl.track.mlflow_tracker import MlflowTracker
from raysl.track.run_folder import RunFolder
from raysl.track.uri import check_tracking_uri

PASSWORD = "pa55-of-the-address"
ENVIRONMENT = {
    name: f"value-of-{name.lower()}"
    for name in (
        "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN",
        "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "AZURE_STORAGE_KEY",
    )
}  # fmt: skip
ADDRESS = f"http://ann:{PASSWORD}@127.0.0.1:9"  # nothing listens there


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def secrets_in(text: bytes) -> list[str]:
    return [secret for secret in (PASSWORD, *ENVIRONMENT.values()) if secret.encode() in text]


@pytest.mark.usefixtures("_environment")
def test_a_run_leaves_no_secret_in_its_folder_in_its_lines_or_in_what_is_sent(
    run_yaml: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sent: list[str] = []

    def spy(self: MlflowTracker) -> None:
        sent.extend(map(str, [*self.params.items(), *self.tags.items()]))
        start(self)

    start = MlflowTracker.start
    monkeypatch.setattr(MlflowTracker, "start", spy)
    words = [
        "train.steps=1", "evaluate.every=null", "track.mlflow=true", "track.log_model=false",
        "backbone={name: resnet18, stem: small, width: 0.125}", "data.views.kinds.0.size_px=16",
        f"track.tracking_uri={ADDRESS}",
    ]  # fmt: skip
    assert main(["pretrain", str(run_yaml("run")), *words, "--json"]) == 0
    folder = RunFolder(tmp_path / "runs" / "run")
    assert "127.0.0.1:9" in folder.config.read_text()
    assert any("ann:***@127.0.0.1:9" in line for line in sent)
    assert secrets_in("\n".join(sent).encode()) == []
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "results.json", "report.html", "encoder.safetensors"} <= names
    assert any("checkpoints" in path.parts for path in files)
    assert [path for path in files if secrets_in(path.read_bytes())] == []
    printed = "".join(capfd.readouterr())
    assert "127.0.0.1:9" in printed
    assert secrets_in(printed.encode()) == []
    # The same command resumes, and its folder's own configuration is not asked with ***.
    assert main(["pretrain", str(run_yaml("run")), *words]) == 0
    assert read_json(folder.results) is not None


def test_a_stored_configuration_has_no_password_to_connect_with() -> None:
    with pytest.raises(ConfigError, match=r"passwords are not stored.*MLFLOW_TRACKING_PASSWORD"):
        check_tracking_uri("http://ann:***@server:5000")


@pytest.mark.parametrize("key", ["data.source", "evaluate.source"])
def test_an_address_of_images_must_not_have_one(run_yaml: Callable[[str], Path], key: str) -> None:
    """It would be stored with the run and its index, which others read."""
    with pytest.raises(ConfigError, match="must not contain a password") as caught:
        load_run(run_yaml("run"), [f"{key}=s3://key:{PASSWORD}@bucket/images"])
    assert PASSWORD not in str(caught.value)
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:secret@host:5000/x", "http://ann:***@host:5000/x"),
        ("http://:secret@host", "http://:***@host"),
        ("at postgresql://ann:s@cr:et@host/db: no", "at postgresql://ann:***@host/db: no"),
        ("mysql://ann@host/db?password=secret&x=1", "mysql://ann@host/db?password=***&x=1"),
        ("two http://a:b@c and https://d:e@f", "two http://a:***@c and https://d:***@f"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("ann:secret@host", "ann:secret@host"),
    ],
)
def test_passwords_of_addresses_are_hidden_in_any_text(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown
    assert str(ConfigError(text)) == shown
