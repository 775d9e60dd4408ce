"""Local copies go with their processes, also with those that were killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from raysl.store.scratch import delete_abandoned, scratch_base, scratch_folder

_KILLED = """
import os, signal
from raysl.store.scratch import scratch_folder
with scratch_folder("run") as folder:
    (folder / "state.pt").write_bytes(b"state")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYSL_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_it_is_empty_bears_the_name_and_is_gone_afterwards(base: Path) -> None:
    with scratch_folder("run") as folder:
        assert folder.name == "run"
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("a")
        assert base in folder.parents
    assert list(base.iterdir()) == []


def test_the_copy_of_a_killed_process_is_deleted_by_the_next(base: Path) -> None:
    process = subprocess.run([sys.executable, "-c", _KILLED], check=False)
    assert process.returncode < 0
    assert len(list(base.glob("*/run/state.pt"))) == 1
    with scratch_folder("run"):
        assert list(base.glob("*/run/state.pt")) == []


def test_a_copy_in_use_and_what_is_no_copy_stay(base: Path) -> None:
    (base / "my-run").mkdir(parents=True)
    (base / "my-run" / ".lock").write_text("1")
    with scratch_folder("run") as folder:
        delete_abandoned(base)
        assert folder.is_dir()
    assert (base / "my-run").is_dir()


def test_by_default_it_is_below_the_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYSL_SCRATCH", raising=False)
    assert scratch_base().name.startswith("raysl-scratch-")
