"""A sweep on Ray whose folder is in a store, killed in the middle and continued elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.evaluate.embedding import encoder_digest
from raysl.store.objects import Store
from raysl.track.run_folder import RunFolder, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("no_ray_cluster")]

SWEEP = """\
base: base.yaml
set: {train.steps: 24, train.checkpoint_every: {steps: 4}, evaluate.every: {steps: 4}}
space: {method.temperature: {grid: [0.1, 0.5]}}
search: {name: grid}
resources: {trials_at_a_time: 1}
track: {mlflow: false}
"""
COMMAND = ["sweep", "s.yaml", "--json"]


def test_a_killed_sweep_goes_on_in_another_scratch_and_equals_that_on_a_disk(
    run_yaml: Any, bucket: str, tmp_path: Path, kill_in_the_middle: Callable[..., None]
) -> None:
    run_yaml("base")
    (tmp_path / "s.yaml").write_text(SWEEP)
    store = Store(f"{bucket}/runs/s")
    command = [*COMMAND, f"output_dir={bucket}/runs"]
    kill_in_the_middle(
        command,
        lambda: any("trials/0001/checkpoints/step-" in name for name in store.list("trials")),
    )
    before = store.list("trials/0000")
    assert "trials/0000/results.json" in before
    elsewhere = os.environ | {"RAYSL_SCRATCH": str(tmp_path / "another machine")}
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "raysl", *each],
            cwd=tmp_path,
            env=elsewhere,
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
        for each in (command, [*COMMAND, "output_dir=disk"])
    ]
    there, disk = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert there["best_metric"] == disk["best_metric"]
    assert there["best_params"] == disk["best_params"]
    assert (there["finished"], there["failed"]) == (2, 0)
    after = store.list("trials/0000")
    assert {name: after[name] for name in before} == before
    for number in range(2):
        local = RunFolder(tmp_path / "disk" / "s" / "trials" / f"{number:04d}")
        copy = RunFolder(tmp_path / "fetched" / f"{number:04d}")
        for name in ("encoder.safetensors", "metrics.jsonl"):
            store.get_file(f"trials/{number:04d}/{name}", copy.path / name)
        assert encoder_digest(copy.encoder) == encoder_digest(local.encoder)
        curves = [
            [
                (r["step"], r.get("train/loss"), r.get("eval/knn_top1"))
                for r in read_metrics(path)
                if "train/loss" in r
            ]
            for path in (copy.metrics, local.metrics)
        ]
        assert curves[0] == curves[1]
    assert not [name for name in store.list() if name.startswith(".tune/")]
    assert not [each for each in (tmp_path / "another machine").rglob("*.pt")]
