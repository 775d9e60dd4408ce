"""The verbs that train one run hand their words on to the same driver."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.config.yaml_text import to_yaml
from raysl.run.recipe import RunConfig, load_run
from raysl.run.shell import Typed
from raysl.track.run_folder import RunFolder

DRIVERS = (
    "raysl.run.typed_run.train_run",
    "raysl.downstream.finetune_command.train_run",
    "raysl.downstream.distill_command.train_run",
)
SUPERVISED = [
    "method={name: supervised}",
    "data.views={recipe: finetune, size_px: 32}",
    "backbone={name: resnet18, stem: small, width: 0.125}",
]

Asked = list[tuple[RunConfig[Any], dict[str, Any]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the driver was called with; it trains nothing."""
    calls: Asked = []

    def train_run(config: RunConfig[Any], **given: Any) -> dict[str, Any]:
        calls.append((config, given))
        return {"run_dir": "runs/r"}

    for driver in DRIVERS:
        monkeypatch.setattr(driver, train_run)
    return calls


@pytest.fixture
def origins(run_yaml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A verb's first word: a configuration, a pretrained run, and a fine-tuned run."""
    path = run_yaml("r")
    for name, overrides in (("pre", []), ("tuned", SUPERVISED)):
        folder = RunFolder(Path("runs") / name)
        folder.path.mkdir(parents=True)
        config = load_run(path, [*overrides, f"name={name}"])
        folder.config.write_text(to_yaml(config.model_dump(mode="json")))
        folder.encoder.touch()
        folder.classifier.touch()
    monkeypatch.setattr("raysl.run.from_run.load_classifier", lambda _: None)
    return {"pretrain": path, "finetune": Path("runs/pre"), "distill": Path("runs/tuned")}


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "distill"])
@pytest.mark.parametrize("flag", ["", "--fresh", "--extend"])
def test_overrides_and_flags_reach_the_driver(
    verb: str,
    flag: str,
    origins: dict[str, Path],
    asked: Asked,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train.log_every=7", "--json", *filter(None, [flag])]
    assert main([verb, str(origins[verb]), *words]) == 0
    ((config, given),) = asked
    assert config.train.log_every == 7
    assert (given["fresh"], given["extend"]) == (flag == "--fresh", flag == "--extend")
    assert given["began_at"] > 0
    method = {"pretrain": "simclr", "finetune": "supervised", "distill": "distill"}[verb]
    assert config.method.name == method
    assert json.loads(capsys.readouterr().out) == {"run_dir": "runs/r"}


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "distill"])
def test_fresh_and_extend_exclude_each_other(
    verb: str, origins: dict[str, Path], asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, str(origins[verb]), "--fresh", "--extend"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    assert asked == []


def test_only_a_run_of_a_file_can_be_repeated_longer(
    origins: dict[str, Path], asked: Asked
) -> None:
    file = origins["pretrain"]
    assert main(["pretrain", str(file), "name=other"]) == 0
    assert main(["finetune", str(file), *SUPERVISED]) == 0
    assert main(["finetune", str(origins["finetune"])]) == 0
    assert [given.get("typed") for _, given in asked] == [
        Typed(file, ("name=other",)),
        Typed(file, tuple(SUPERVISED)),
        None,
    ]


def test_a_pretraining_is_refused_with_the_command_that_does_it(
    origins: dict[str, Path], asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(origins["pretrain"]), "seed=3"]) == 1
    error = capsys.readouterr().err
    assert "method simclr pretrains; give method supervised" in error
    assert f"raysl pretrain {origins['pretrain']} seed=3" in error
    assert asked == []


@pytest.mark.parametrize("verb", ["finetune", "distill"])
def test_other_images_leave_the_settings_of_the_old_ones_and_say_which(
    verb: str,
    origins: dict[str, Path],
    photos: Path,
    asked: Asked,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([verb, str(origins[verb]), f"data.source={photos}"]) == 0
    ((config, _),) = asked
    assert config.data.limit is None
    name = origins[verb].name
    assert f"data.source names other images than {name} uses" in capsys.readouterr().err
