"""Fixtures that several rooms' tests need."""

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before anything loads torch or Ray, and inherited by every process the tests start. Threads that
# wait must sleep; Ray's report interval, start-up patience and noise are for tests.
os.environ.update(
    {
        "OMP_WAIT_POLICY": "passive",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "180",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "GIT_PYTHON_REFRESH": "quiet",
    }
)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in two processes, and a choice of tests in this one."""
    return 2 if config.args_source is not pytest.Config.ArgsSource.ARGS else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Let one process run all files whose tests share a Ray."""
    return _OneForRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that share a Ray first, then those that start one of their own."""
    items.sort(key=lambda item: (not _shares_ray(item.path), not _is_on_ray(item.path)))


class _OneForRay(LoadScopeScheduling):
    """Sends whole files to the processes, and those whose tests share a Ray to the same one.

    Tests on Ray mostly wait for processes to start, one after the other. Those that start a Ray of
    their own take their files' turn in the other process, beside the tests that share one.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = Path(nodeid.partition("::")[0])
        if _shares_ray(self.config.rootpath / path):
            return "ray"
        # The pool of ranks is started by one process.
        return path.parent.name if path.parent.name == "distributed" else str(path)


@cache
def _shares_ray(path: Path) -> bool:
    """Return whether tests of a file use the Ray that tests share."""
    return re.search(r"\"ray_cluster\"|\bray_cluster: None", path.read_text()) is not None


@cache
def _is_on_ray(path: Path) -> bool:
    """Return whether a file has tests on Ray."""
    return _shares_ray(path) or re.search(r"mark\.ray\b", path.read_text()) is not None


RUN = """\
data:
  source: digits
  limit: 160
  views:
    recipe: custom
    kinds: [{count: 2, size_px: 32, crop: {scale: [0.5, 1.0]}, ops: [{op: rotate}]}]
backbone: {name: resnet18, width: 0.125}
method: {name: simclr}
optim: {base_lr: 0.1}
train: {steps: 6, global_batch_size: 32, log_every: 1, checkpoint_every: {steps: 2}}
evaluate: {every: {steps: 3}, final: [knn], max_train_images: 200, max_test_images: 100}
cluster: {num_train_workers: 0, threads_per_train_worker: 1, num_data_workers: 1}
track: {mlflow: false}
"""


@pytest.fixture(scope="session")
def run_text() -> str:
    """The YAML text of a small run on the digits, without Ray."""
    return RUN


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write a small run on the digits, with the test's folder as the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(RUN)
        return path

    return write


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out all pictures and pages of runs, evaluations and sweeps: they have other tests."""
    for name in ("run.page.draw_all", "downstream.evaluation_page.draw_evaluation"):
        monkeypatch.setattr(f"raysl.{name}", lambda *_, **__: [])
    monkeypatch.setattr("raysl.sweep.page.draw_sweep", lambda *_, **__: [])


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an empty MLflow store, which takes seconds to make."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def empty_store_here(empty_store: Path, tmp_path: Path) -> None:
    """Put an empty MLflow store where the runs of this test would make one."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")


@pytest.fixture(scope="session")
def _ray_session() -> Iterator[Callable[[], None]]:
    import ray

    from raysl.run.forks import end_server
    from raysl.run.ray_forks import forked_workers

    def start() -> None:
        if not ray.is_initialized():
            with forked_workers(["raysl.sources.builtin"]):  # the digits
                ray.init(address="local", num_cpus=4, log_to_driver=False, include_dashboard=True)

    yield start
    ray.shutdown()
    end_server()


@pytest.fixture
def ray_cluster(_ray_session: Callable[[], None]) -> None:
    """A Ray of four logical CPUs that all tests share."""
    _ray_session()


@pytest.fixture
def no_ray_cluster() -> None:
    """End the shared Ray: this test starts one of its own."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def processes() -> Callable[[str], list[Any]]:
    """Find the processes below this one that have a text in their command line."""
    import psutil

    def find(text: str) -> list[Any]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if text in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    return find


@pytest.fixture
def kill_in_the_middle() -> Callable[[Sequence[str], Callable[[], bool]], None]:
    """Start a command of raysl here; once it is time, kill it and all that it started."""
    import psutil

    def kill(words: Sequence[str], is_time: Callable[[], bool]) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "raysl", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            patience = time.monotonic() + 900
            while not is_time():
                assert process.poll() is None, "the command ended before it was killed"
                assert time.monotonic() < patience, "the command did not come far enough"
                time.sleep(0.1)
            below = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in below:
                if child.is_running():
                    child.kill()
            psutil.wait_procs(below, timeout=30)

    return kill


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[Any]:
    moto_server = pytest.importorskip(
        "moto.server", reason="no moto; `uv sync --all-groups` installs it"
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(
    _s3_server: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The address of a new bucket of a server on the loopback, and a scratch of the test."""
    import pyarrow.fs as pafs

    host, port = _s3_server.get_host_and_port()
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("RAYSL_SCRATCH", str(scratch))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{scratch.name.removeprefix('scratch')}"
    pafs.S3FileSystem(
        endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True, region="us-east-1"
    ).create_dir(name)
    return f"s3://{name}"


@pytest.fixture
def refused() -> Callable[..., Any]:
    """Try bad inputs at a door; return what came of each: its message, or None if it was taken.

    Fails if one ends in another error than raysl's own, which would be a traceback, if a message
    names nothing of what was given, or if one takes longer than half a minute.
    """
    from time import perf_counter

    from raysl.errors import RayslError

    def attempt(
        door: Callable[[Any], object], cases: Mapping[str, tuple[Any, Sequence[str]]]
    ) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        wrong = []
        for name, (given, names) in cases.items():
            start = perf_counter()
            try:
                door(given)
                found[name] = None
            except RayslError as error:
                found[name] = str(error)
                if not any(each in str(error) for each in names):
                    wrong.append(f"{name}: names none of {names}: {error}")
            except Exception as error:
                wrong.append(f"{name}: {error!r}")
            if perf_counter() - start > 30:
                wrong.append(f"{name}: took {perf_counter() - start:.0f} s")
        assert not wrong, "\n".join(wrong)
        return found

    return attempt


@pytest.fixture
def timm() -> Any:
    """The library timm, which only some tests need: `uv sync --group models`."""
    return pytest.importorskip("timm")


@pytest.fixture
def make_trial() -> Callable[..., Any]:
    """Make a trial of a sweep that was measured once an epoch."""
    from raysl.sweep.trial import Trial

    def make(number: int, params: dict[str, Any], values: Sequence[float], **more: Any) -> Trial:
        given = {
            "status": "finished",
            "curve": tuple((float(epoch), value) for epoch, value in enumerate(values, 1)),
            "metric": values[-1] if values else None,
            "also": {},
            "epoch": float(len(values)),
            "seconds": 60.0 * len(values),
            "error": None,
            "path": Path("trials") / f"{number:04d}",
            "mlflow_run_id": None,
        }
        return Trial(number=number, params=params, **(given | more))

    return make


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Callable[..., Path]:
    """Write an untrained residual network of few channels for images of 16 px."""
    import torch

    from raysl.encoder.file import save_encoder
    from raysl.nn.backbones import BackboneConfig, build_backbone

    def write(name: str = "encoder", *, seed: int = 0, **facts: Any) -> Path:
        torch.manual_seed(seed)
        config = BackboneConfig(name="resnet18", width=0.125)
        path = tmp_path / name / "encoder.safetensors"
        path.parent.mkdir(exist_ok=True)
        known = {"image_size_px": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
        known |= {"method": "simclr", "run": name, "backbone": config.model_dump(mode="json")}
        backbone = build_backbone(config, image_size_px=16)
        save_encoder(path, backbone, description=known | facts)
        return path

    return write


@pytest.fixture(scope="session")
def draw_images() -> Callable[..., Path]:
    """Write images of random pixels: 000.png, ...; one of the same number is always the same."""
    import cv2
    import numpy as np

    def draw(
        folder: Path, numbers: range, *, size: tuple[int, int] = (8, 8), suffix: str = ".png"
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            rng = np.random.default_rng(number)
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"{number:03d}{suffix}"), pixels)
        return folder

    return draw


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write 100 PNGs of 20 x 24 pixels in two class folders, and one file that is no image."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for number in range(100):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(low, (24, 20), interpolation=cv2.INTER_CUBIC))
    (tmp_path / "photos" / "class0" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"
