"""Collect a run's environment for its record: code, hardware, packages, data."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from raysl.run.recipe import RunConfig
from raysl.sources.source import Source

_PACKAGES = ("ray", "torch", "torchvision", "mlflow", "pyarrow", "numpy", "opencv-python-headless")


def flatten_mapping(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted names; lists stay values."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flatten_mapping(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def tags_of(config: RunConfig[Any], source: Source, cluster: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a run: code, machine, packages and a fingerprint of the images."""
    return {
        "method": config.method.name,
        "backbone": config.backbone.name,
        "data.name": source.name,
        "data.fingerprint": source.fingerprint,
        "hardware.cpu": processor(),
        "hardware.cpus": str(psutil.cpu_count()),
        "hardware.memory_gib": f"{psutil.virtual_memory().total / 2**30:.0f}",
        "host": platform.node(),
        "python": platform.python_version(),
        **{
            f"package.{entry.split('==')[0]}": entry.split("==")[1]
            for entry in packages(*_PACKAGES)
        },
        **git_state(),
        **cluster,
    }


def packages(*names: str) -> list[str]:
    """Return ``name==version`` for each of the installed packages named."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def processor() -> str:
    """Return the name of this machine's processor, or its architecture if that is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_state() -> dict[str, str]:
    """Return the git commit of raysl's code and whether files differ; empty without git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"git.commit": commit, "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
