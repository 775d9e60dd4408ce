"""The fork server starts before torch is imported, if a run starts a Ray of its own."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from raysl.run import fork_start
from raysl.run.fork_start import SWITCH, server_beside_imports

Starts = Callable[[Path | str, Sequence[str]], bool]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    """Return whether a run's server would be started beside the imports; none is started."""
    begun: list[bool] = []
    monkeypatch.setattr(fork_start, "start_server", lambda: begun.append(True))
    monkeypatch.setattr(fork_start.sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)

    def starts(config: Path | str, overrides: Sequence[str]) -> bool:
        begun.clear()
        with server_beside_imports(config, overrides):
            return bool(begun)

    return starts


def test_only_a_run_on_ray_starts_a_server(starts: Starts, tmp_path: Path) -> None:
    here = tmp_path / "here.yaml"
    here.write_text("extends: quickstart\ncluster: {num_train_workers: 0}\n")
    assert starts("quickstart", [])
    assert starts(Path("quickstart"), ["seed=3"])
    assert not starts("quickstart", ["cluster.num_train_workers=0"])
    assert not starts(here, [])
    assert starts(here, ["cluster.num_train_workers={min: 1, max: 2}"])


def test_what_the_command_will_refuse_starts_no_server(starts: Starts, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("cluster: [")
    for config, overrides in (
        (broken, []),
        (tmp_path / "missing.yaml", []),
        (tmp_path, []),
        ("quickstart", ["no override"]),
    ):
        assert not starts(config, overrides)


def test_where_ray_runs_or_forks_are_unwanted_no_server_starts(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not starts("s3://bucket/quickstart.yaml", [])
    for name, value in (("RAY_ADDRESS", "127.0.0.1:6379"), (SWITCH, "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not starts("quickstart", [])
    monkeypatch.setitem(sys.modules, "ray", sys)
    assert not starts("quickstart", [])


def test_the_arguments_of_a_run_are_known_without_torch_and_ray() -> None:
    code = "import sys, raysl.run.command; assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scripts_of_ray_are_found_without_it() -> None:
    assert (fork_start.scripts_of_ray() / "default_worker.py").exists()
