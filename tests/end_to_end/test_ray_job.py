"""`ray job submit` against a cluster of two raylets on this machine, as docs/cluster.md has it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from raysl.track.run_folder import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
# None of Ray's defaults, which another Ray on this machine may have.
GCS_PORT, DASHBOARD_PORT, AGENT_PORT = 26379, 28265, 28266


def run(*command: str, env: dict[str, str], cwd: Path | None = None) -> str:
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
        )
        # A cluster takes jobs some seconds after it has started.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start two raylets, and end them by process, not with `ray stop`: others may run Ray too."""
    # Ray's sockets lie below its temporary folder, and their paths have a limit of 107 bytes.
    temporary = Path("/tmp") / f"raysl-job-{os.getpid()}"
    env = {
        **os.environ,
        "RAYSL_HOME": str(tmp_path / "home"),
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    }
    before = {process.pid for process in psutil.process_iter()}
    head = ["--head", f"--port={GCS_PORT}", f"--dashboard-port={DASHBOARD_PORT}"]
    head += ["--include-dashboard=true", f"--temp-dir={temporary}"]
    head += [f"--dashboard-agent-listen-port={AGENT_PORT}"]
    node = ["--num-cpus=2", f"--object-store-memory={200 << 20}"]  # the tests' Ray runs too
    run(str(RAY), "start", *head, *node, "--disable-usage-stats", env=env)
    run(str(RAY), "start", f"--address=127.0.0.1:{GCS_PORT}", *node, env=env)
    try:
        yield env
    finally:
        ours = [
            process
            for process in psutil.process_iter(["pid", "cmdline"])
            if process.pid not in before
            and str(temporary) in " ".join(process.info["cmdline"] or [])
        ]
        ours += [child for process in ours for child in _children(process)]
        for process in ours:
            _end(process)
        psutil.wait_procs(ours, timeout=20)
        shutil.rmtree(temporary, ignore_errors=True)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        children: list[psutil.Process] = process.children(recursive=True)
    except psutil.Error:
        return []
    return children


def _end(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.kill()


def test_a_submitted_job_trains_on_two_nodes_and_keeps_its_results(
    cluster: dict[str, str], run_yaml: Callable[[str], Path], tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("raysl", "pipelines", "configs"):
        shutil.copytree(
            REPOSITORY / name, project / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(run_yaml("job"), project / "configs" / "job.yaml")
    output = run(
        str(RAY),
        "job",
        "submit",
        f"--address=http://127.0.0.1:{DASHBOARD_PORT}",
        "--working-dir",
        ".",
        "--",
        sys.executable,
        "pipelines/pretrain.py",
        "configs/job.yaml",
        "cluster.num_train_workers=2",
        "train.steps=2",
        "evaluate.every=null",
        "--json",
        env=cluster,
        cwd=project,
    )
    line = next(line for line in output.splitlines() if line.startswith('{"run_dir"'))
    result = json.loads(line)
    folder = tmp_path / "home" / "runs" / "job"
    assert result["run_dir"] == str(folder)
    assert "2 train worker(s)" in output
    assert "2 node(s)" in output
    losses = [r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r]
    assert len(losses) == 2
    assert (folder / "encoder.safetensors").exists()
