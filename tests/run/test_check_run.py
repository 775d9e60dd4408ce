"""What a start refuses, which `raysl config` finds too: neither trains anything."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking._tracking_service.utils import _tracking_store_registry

from raysl.cli import main
from raysl.errors import ConfigError, RayslError
from raysl.run.check import check_names, check_start
from raysl.run.recipe import Derived, load_run
from raysl.sources.open import open_source
from raysl.track.uri import check_tracking_uri

Check = Callable[..., Derived]
ONE_VIEW = "data.views.kinds.0.count=1"
FULL_WIDTH = "backbone.width=1"  # other libraries' networks have no other


@pytest.fixture
def check(run_yaml: Callable[[str], Path]) -> Check:
    """Ask whether a run of 160 digits, 6 steps of 32 and 5 an epoch, could start."""

    def ask(*overrides: str) -> Derived:
        config = load_run(run_yaml("a"), overrides)
        check_names(config)
        return check_start(config, open_source(config.data, data=config.data))

    return ask


def refused(check: Check, *overrides: str) -> str:
    with pytest.raises(RayslError) as caught:
        check(*overrides)
    return str(caught.value)


class TestBestCheckpoints:
    @pytest.mark.parametrize("every", ["{steps: 2}", "{steps: 4}"])
    def test_are_measured_where_evaluations_meet_checkpoints(
        self, check: Check, every: str
    ) -> None:
        check("train.keep_best={}", f"evaluate.every={every}")

    @pytest.mark.parametrize(
        ("every", "told"),
        [
            ("null", "which evaluate.every=null leaves out"),
            ("{steps: 3}", "every 3 steps and checkpoints every 2 never fall on the same step"),
        ],
    )
    def test_that_would_never_be_measured_are_refused(
        self, check: Check, every: str, told: str
    ) -> None:
        text = refused(check, "train.keep_best={}", f"evaluate.every={every}")
        assert text.startswith("train.keep_best.metric=eval/knn_top1")
        assert told in text

    def test_by_the_loss_need_no_evaluation(self, check: Check) -> None:
        check("train.keep_best={metric: train/loss, mode: min}", "evaluate.every=null")

    def test_by_a_metric_that_needs_labels_are_refused_without_labels(self, check: Check) -> None:
        text = refused(check, "train.keep_best={}", "evaluate.every={steps: 2}", "data.labels=none")
        assert "train.keep_best.metric=eval/knn_top1 is never measured" in text
        assert "such as eval/rankme" in text
        check(
            "train.keep_best={metric: eval/rankme}", "evaluate.every={steps: 2}", "data.labels=none"
        )

    def test_by_a_classifiers_accuracy_are_refused_where_none_is_trained(
        self, check: Check
    ) -> None:
        text = refused(check, "train.keep_best={metric: eval/top1}", "evaluate.every={steps: 2}")
        assert "method simclr trains no classifier" in text
        assert "use eval/knn_top1" in text

    def test_by_an_unknown_metric_are_refused_with_the_known_ones(self, check: Check) -> None:
        text = refused(check, "train.keep_best={metric: knn}")
        assert "train.keep_best.metric" in text
        assert "eval/knn_top1" in text


class TestLengths:
    @pytest.mark.parametrize("length", ["{steps: 6}", "{epochs: 1}", "{fraction: 1.0}"])
    def test_a_warm_up_as_long_as_the_run_may_be(self, check: Check, length: str) -> None:
        assert 5 <= check(f"optim.warmup={length}").warmup_steps <= 6

    @pytest.mark.parametrize(("length", "steps"), [("{steps: 7}", 7), ("{epochs: 2}", 10)])
    def test_a_longer_one_is_refused(self, check: Check, length: str, steps: int) -> None:
        text = refused(check, f"optim.warmup={length}")
        assert f"optim.warmup={length} is {steps} steps, longer than the run of 6 (5 per" in text
        assert "use at most 6 steps" in text

    def test_so_is_that_of_an_adversary(self, check: Check) -> None:
        method = "method={name: context_encoder, bottleneck_dim: 8, decoder_width: 2}"
        text = refused(check, ONE_VIEW, method, "adversary_optim={warmup: {steps: 7}}")
        assert text.startswith("adversary_optim.warmup={steps: 7} is 7 steps")

    @pytest.mark.parametrize("name", ["teacher_temperature_warmup", "freeze_last_layer"])
    def test_so_are_a_methods_own(self, check: Check, name: str) -> None:
        text = refused(check, f"method={{name: dino, {name}: {{epochs: 2}}}}")
        assert text.startswith(f"method.{name}={{epochs: 2}} is 10 steps, longer than the run")

    def test_their_defaults_are_for_any_run(self, check: Check) -> None:
        assert check("method={name: dino}", "train.steps=2").total_steps == 2

    def test_a_queue_that_would_never_begin_is_refused(self, check: Check) -> None:
        swav = "{name: swav, num_prototypes: 8, hidden_dim: 8, projection_dim: 8}"
        assert check(f"method={swav}").total_steps == 6
        text = refused(check, f"method={swav}", "method.queue_length=32")
        assert text.startswith("method.queue_start={epochs: 15} is 75 steps, longer than")


class TestNames:
    def test_a_network_that_torchvision_lacks(self, check: Check) -> None:
        text = refused(check, "backbone.name=torchvision:resnet51", FULL_WIDTH)
        assert "torchvision has no classifier of this name; did you mean resnet50" in text

    def test_a_network_that_timm_lacks(self, check: Check, timm: Any) -> None:
        assert "did you mean resnet50" in refused(check, "backbone.name=timm:resnet50x", FULL_WIDTH)

    @pytest.mark.parametrize(
        "uri", ["ftp://x/y", "htp://host:5000", "redis://x", "postgres://u:secret@h/db"]
    )
    def test_an_address_of_a_kind_that_mlflow_lacks(
        self, check: Check, uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = refused(check, "track.mlflow=true", f"track.tracking_uri={uri}")
        scheme = uri.partition(":")[0]
        assert f"MLflow does not support addresses that begin with {scheme}:" in text
        assert "sqlite" in text
        assert "secret" not in text
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert refused(check, "track.mlflow=true").startswith("MLFLOW_TRACKING_URI=")
        check("track.mlflow=false")

    @pytest.mark.parametrize(
        "uri",
        [
            "http://host:5000",
            "HTTPS://host",
            "sqlite:////tmp/x.db",
            "mysql+pymysql://u:p@host/db",
            "postgresql://host/db",
            "file:///tmp/mlruns",
            "mlruns",
            "C:\\runs",
            "databricks",
            "databricks://profile",
        ],
    )
    def test_an_address_that_it_has(self, uri: str) -> None:
        check_tracking_uri(uri)

    def test_a_server_without_a_host(self) -> None:
        with pytest.raises(ConfigError, match="has no host; write http://HOST:PORT"):
            check_tracking_uri("http://")

    def test_the_kinds_are_those_that_mlflow_registers(self) -> None:
        schemes = [scheme for scheme in _tracking_store_registry._registry if scheme]
        assert "databricks" in schemes
        for scheme in schemes:
            check_tracking_uri(f"{scheme}://host/x")


class TestNetwork:
    @pytest.mark.parametrize(
        ("overrides", "part"),
        [
            (["method.hidden_dim=1000000000", "method.projection_dim=9999"], "most of it in proj"),
            (["data.views.kinds.0.size_px=1000000"], "for 2 view(s) of at most 1000000 px"),
            (["train.global_batch_size=160", "data.views.kinds.0.size_px=20000"], "of a batch"),
        ],
    )
    def test_what_no_memory_holds(self, check: Check, overrides: list[str], part: str) -> None:
        text = refused(check, *overrides)
        assert part in text
        assert "this machine has" in text
        assert "; lower " in text

    def test_a_size_that_no_number_holds(self, check: Check) -> None:
        text = refused(check, f"method.hidden_dim={10**18}")
        assert "method simclr on backbone.name=resnet18 cannot be built" in text

    def test_weights_that_do_not_fit(self, check: Check, tiny_encoder: Callable[..., Path]) -> None:
        text = refused(check, f"backbone.weights={tiny_encoder()}", "backbone.width=0.25")
        assert "its weights do not fit the backbone" in text
        check(f"backbone.weights={tiny_encoder()}")

    def test_draws_nothing(self, check: Check) -> None:
        torch.manual_seed(3)
        state = torch.get_rng_state()
        check()
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_queue_longer_than_the_images(self, check: Check) -> None:
        text = refused(check, "method={name: moco, queue_length: 161}")
        assert "method.queue_length=161" in text

    def test_one_image_before_a_batch_norm_of_the_encoder(self, check: Check) -> None:
        """At 32 px the last stage of ResNet-18 has one pixel, with the stem for CIFAR-10 16."""
        text = refused(check, "method={name: moco}", "train.global_batch_size=1")
        assert "backbone.name=resnet18 or the head of method moco has batch norm" in text
        assert "use train.global_batch_size=2 or more" in text
        check("method={name: moco}", "train.global_batch_size=1", "backbone.stem=cifar")
        check("method={name: moco}", "train.global_batch_size=2")

    @pytest.mark.parametrize(("rotations", "fits"), [("all", True), ("one", False)])
    def test_four_turns_of_one_image_are_four(
        self, check: Check, rotations: str, fits: bool
    ) -> None:
        method = f"method={{name: rotation, rotations: {rotations}}}"
        given = (ONE_VIEW, method, "train.micro_batch_size=1")
        if fits:
            check(*given)
        else:
            assert "use train.micro_batch_size=2 or null" in refused(check, *given)


def test_config_says_what_a_start_refuses(
    run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(run_yaml("a"))
    for given in (
        "optim.warmup.steps=7",
        "backbone.weights=nowhere",
        "backbone.name=torchvision:x",
    ):
        said = []
        for verb in ("config", "pretrain"):
            assert main([verb, path, given, FULL_WIDTH]) == 1
            said.append(capsys.readouterr().err.partition(": ")[2])
        assert said[0] == said[1]
        assert given.partition("=")[2].removeprefix("torchvision:") in said[0]
    assert not list(Path("runs").glob("*/metrics.jsonl"))


def test_config_loads_neither_ray_nor_a_compiler(run_yaml: Callable[[str], Path]) -> None:
    code = (
        "import sys; from raysl.cli import main; main(['config', sys.argv[1], '--json'])\n"
        "sys.exit(' '.join({'ray', 'mlflow', 'timm', 'torchvision', 'torch._dynamo'} "
        "& set(sys.modules)) or 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(run_yaml("a"))],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr.strip()) == (0, "")
