"""What a run keeps of its surroundings."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.run import environment
from raysl.run.environment import flatten_mapping, git_state, packages, processor, tags_of
from raysl.run.recipe import load_run
from raysl.sources.source import ArraySource


def test_nested_settings_get_dotted_names_and_lists_stay() -> None:
    values = {"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None, "g": {}}
    assert flatten_mapping(values) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": None}
    assert flatten_mapping({"a": 1}, "derived.") == {"derived.a": 1}


def test_packages_have_no_build_in_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.0+cpu")
    assert packages("torch", "numpy") == ["torch==2.9.0", "numpy==2.9.0"]


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ({"rev-parse": "abc\n", "status": ""}, {"git.commit": "abc", "git.dirty": "false"}),
        ({"rev-parse": "abc\n", "status": " M x\n"}, {"git.commit": "abc", "git.dirty": "true"}),
        ({}, {}),  # no repository, as of an installed package
    ],
)
def test_the_commit_is_known_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], state: dict[str, str]
) -> None:
    def run(words: list[str], **_: Any) -> Any:
        if words[3] not in answers:
            raise subprocess.CalledProcessError(128, words)
        return subprocess.CompletedProcess(words, 0, stdout=answers[words[3]])

    monkeypatch.setattr(subprocess, "run", run)
    assert git_state() == state


def test_a_machine_without_cpuinfo_has_a_processor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any, **__: Any) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert processor()


def test_tags_name_code_machine_packages_images_and_cluster(
    run_yaml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "git_state", lambda: {"git.commit": "abc"})
    source = ArraySource("made up", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    tags = tags_of(load_run(run_yaml("r")), source, {"cluster.nodes": "2"})
    assert (tags["method"], tags["backbone"], tags["data.name"]) == (
        "simclr",
        "resnet18",
        "made up",
    )
    assert tags["data.fingerprint"] == source.fingerprint
    assert {"package.torch", "package.ray", "hardware.cpu", "python", "host"} <= set(tags)
    assert (tags["git.commit"], tags["cluster.nodes"]) == ("abc", "2")
    assert all(isinstance(value, str) for value in tags.values())
