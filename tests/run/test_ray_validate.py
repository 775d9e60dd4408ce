"""Evaluation beside training: the same values, whatever happens to those who measure."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from raysl.encoder.file import save_encoder
from raysl.errors import DataError
from raysl.evaluate.online import open_online
from raysl.evaluate.protocol import EvaluateConfig
from raysl.nn.backbones import build_backbone
from raysl.run.build import describe
from raysl.run.measuring import measure_file
from raysl.run.ray_cluster import Layout
from raysl.run.ray_validate import Evaluator, Share, evaluator_share
from raysl.run.recipe import load_run
from raysl.sources.source import ArraySource

ON_RAY = ["cluster.num_train_workers=1"]


class TestShareBeside:
    @pytest.mark.parametrize(
        ("online", "use_gpu", "spare_gpus", "spare_cpus", "wanted"),
        [
            ("auto", False, 0, 0, Share(False, 1)),
            ("auto", False, 0, 5, Share(False, 5)),
            ("auto", True, 1, 0, Share(True, 1)),
            ("auto", True, 0, 50, None),  # the train workers' GPUs are faster than any CPU
            ("background", True, 0, 50, Share(False, 8)),
            ("blocking", False, 0, 5, None),
            ("blocking", True, 1, 0, None),
        ],
    )
    def test_takes_what_others_leave(
        self,
        run_yaml: Callable[[str], Path],
        online: str,
        use_gpu: bool,
        spare_gpus: int,
        spare_cpus: int,
        wanted: Share | None,
    ) -> None:
        config = load_run(run_yaml("a"), [f"evaluate.online={online}", *ON_RAY])
        layout = Layout(1, 1.0, 1, 1.0, use_gpu, 1, 1, spare_cpus, spare_gpus)
        assert evaluator_share(config, layout) == wanted


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestEvaluator:
    def test_measures_as_this_process_does_after_a_bad_file_and_after_its_process_was_killed(
        self, run_yaml: Callable[[str], Path], tmp_path: Path
    ) -> None:
        config = load_run(run_yaml("a"), ON_RAY)
        pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
        images = ArraySource("made up", pixels)
        sets = open_online(EvaluateConfig(), None, images, size_px=32, num_threads=1)
        path = tmp_path / "step-000000001.safetensors"
        backbone = build_backbone(config.backbone, image_size_px=32)
        save_encoder(path, backbone, description=describe(config))
        broken = tmp_path / "step-000000002.safetensors"
        broken.write_bytes(path.read_bytes()[:-5])
        before, free = running_measurers(), ray.available_resources()
        evaluator = Evaluator(config, Share(False, 1), num_ranks=2)
        try:
            first, bad, last = (evaluator(each, sets) for each in (path, broken, path))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            wanted = measure_file(path, sets, config, device=torch.device("cpu"), num_ranks=2)
            torch.set_num_threads(threads)
            assert first.result(60) == last.result(60) == wanted
            with pytest.raises(DataError, match="not a safetensors file"):
                bad.result(60)
            assert ray.available_resources()["CPU"] == free["CPU"]
            (process,) = running_measurers() - before
            assert process.nice() >= 10
            process.kill()
            assert evaluator(path, sets).result(60) == wanted
        finally:
            evaluator.close()
        deadline = time.monotonic() + 30
        while running_measurers() - before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert running_measurers() == before


def running_measurers() -> set[Any]:
    return with_name("_Measurer")


def with_name(name: str) -> set[Any]:
    """Return the processes below this one that Ray named so."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
        except psutil.Error:
            continue
    return found
