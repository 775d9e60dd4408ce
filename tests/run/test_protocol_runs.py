"""The runs that protocols of ``evaluate.final`` are, below a pretraining's folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raysl.encoder.file import save_encoder
from raysl.errors import ConfigError, DivergedError
from raysl.evaluate.registry import units_of
from raysl.evaluate.training_source import open_training_source
from raysl.nn.backbones import build_backbone
from raysl.run.build import describe
from raysl.run.check import check_start
from raysl.run.protocol_runs import protocol_run, protocols_to_train, train_protocols
from raysl.run.recipe import RunConfig, load_run
from raysl.sources.source import Source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, read_metrics

VIT = "backbone={name: vit_tiny, patch_size_px: 8, depth: 2}"
MAE = [
    VIT,
    "data.views={recipe: mae, size_px: 32}",
    "method={name: mae, decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}",
]
DINO = [
    VIT,
    "data.views={recipe: dino, size_px: 32, local_count: 0}",
    "method={name: dino, num_prototypes: 16}",
]
TUNED = ["evaluate.final=[knn,finetune]", "evaluate.seeds=[0,1]"]
MEASURED: Results = {"steps": 6, "knn_top1": 0.5, "protocols": {"knn": "knn@1"}}

Pretrained = tuple[RunConfig[Any], RunFolder, Source]


@pytest.fixture
def pretrained(run_yaml: Callable[[str], Path], tmp_path: Path) -> Callable[..., Pretrained]:
    def make(*overrides: str) -> Pretrained:
        config = load_run(run_yaml("pre"), [*TUNED, *overrides])
        folder = RunFolder(tmp_path / "runs" / "pre")
        folder.path.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        encoder = build_backbone(config.backbone, image_size_px=32)
        save_encoder(folder.encoder, encoder, description=describe(config))
        return config, folder, open_training_source(config.data, config.evaluate, config.method)

    return make


class Trains:
    """Stands in for a training; remembers each run that it trained."""

    def __init__(self) -> None:
        self.runs: list[RunConfig[Any]] = []

    def __call__(self, config: RunConfig[Any], folder: RunFolder, source: Source) -> Results:
        self.runs.append(config)
        results: Results = {"top1": 0.5 + 0.1 * config.seed, "num_labels": 7}
        folder.write_results(results)
        return results


def trained(pretrained: Pretrained, train: Any) -> Results:
    config, folder, source = pretrained
    return train_protocols(
        config, MEASURED, folder=folder, source=source, train=train, trains_here=True
    )


class TestTrainProtocols:
    def test_adds_mean_and_deviation_over_seeds_to_results_and_metrics(
        self, pretrained: Callable[..., Pretrained]
    ) -> None:
        given = pretrained("evaluate.finetune.label_fraction=0.5")
        train = Trains()
        results = trained(given, train)
        assert [run.seed for run in train.runs] == [0, 1]
        assert results["finetune_top1"] == pytest.approx(0.55)
        assert results["finetune_top1_std"] == pytest.approx(0.05)  # type: ignore[typeddict-item]
        assert (results["finetune_labels"], results["knn_top1"]) == (7, 0.5)
        assert "changed: label_fraction=0.5" in results["protocols"]["finetune"]
        assert given[1].read_results() == results
        (record,) = read_metrics(given[1].metrics)
        assert record["step"] == 6
        assert record["final/finetune_top1"] == results["finetune_top1"]

    def test_goes_on_with_what_an_interrupted_start_left(
        self, pretrained: Callable[..., Pretrained]
    ) -> None:
        given, train = pretrained(), Trains()

        def interrupted(config: RunConfig[Any], folder: RunFolder, source: Source) -> Results:
            if config.seed == 1:
                raise KeyboardInterrupt
            return train(config, folder, source)

        with pytest.raises(KeyboardInterrupt):
            trained(given, interrupted)
        assert given[1].read_results() is None
        trained(given, train)
        assert [run.seed for run in train.runs] == [0, 1]

    def test_another_encoder_starts_anew_and_keeps_the_old_run(
        self, pretrained: Callable[..., Pretrained]
    ) -> None:
        given, train = pretrained(), Trains()
        trained(given, train)
        config, folder, _ = given
        save_encoder(
            folder.encoder,
            build_backbone(config.backbone, image_size_px=32),  # other random weights
            description=describe(config),
        )
        trained(given, train)
        assert [run.seed for run in train.runs] == [0, 1, 0, 1]
        assert len([path for path in folder.protocols.iterdir() if path.is_dir()]) == 4

    def test_an_error_names_the_protocol(self, pretrained: Callable[..., Pretrained]) -> None:
        def diverge(*_: Any) -> Results:
            raise DivergedError("the loss is inf")

        wanted = r"^evaluate\.finetune: the loss is inf; lower base_lr of evaluate\.finetune"
        with pytest.raises(DivergedError, match=wanted):
            trained(pretrained(), diverge)

    def test_is_nothing_where_nothing_is_trained(
        self, pretrained: Callable[..., Pretrained]
    ) -> None:
        given = pretrained("evaluate.final=[knn]")
        assert trained(given, None) is MEASURED
        assert given[1].read_results() is None  # which the worker wrote


class TestProtocolRun:
    def first(self, given: Pretrained) -> RunConfig[Any]:
        config, folder, source = given
        (unit, *_) = units_of(config.evaluate, protocols_to_train(config)[0])
        return protocol_run(config, unit, place=folder.path, source=source)

    @pytest.mark.parametrize(("overrides", "pool"), [(MAE, "mean_norm"), (DINO, "cls")])
    def test_of_mae_takes_the_mean_of_the_patches(
        self,
        run_yaml: Callable[[str], Path],
        tmp_path: Path,
        overrides: list[str],
        pool: str,
    ) -> None:
        config = load_run(run_yaml("pre"), [*TUNED, *overrides])
        source = open_training_source(config.data, config.evaluate, config.method)
        run = self.first((config, RunFolder(tmp_path / "pre"), source))
        assert run.backbone.pool == pool
        assert run.backbone.weights == str(tmp_path / "pre" / "encoder.safetensors")
        assert run.optim.name == "adamw"

    def test_is_a_supervised_run_below_the_folder_on_the_same_images(
        self, pretrained: Callable[..., Pretrained]
    ) -> None:
        given = pretrained("evaluate.finetune={label_fraction: 0.25, epochs: 3, head_layers: 1}")
        run = self.first(given)
        assert (run.method.name, run.method.head_layers) == ("supervised", 1)
        assert run.output_dir == str(given[1].protocols)
        assert (run.train.epochs, run.train.global_batch_size) == (3.0, 40)
        assert (run.data.source, run.data.limit) == ("digits", 160)
        assert run.evaluate.trained == ()
        assert not run.track.mlflow

    def test_too_few_labels_are_refused_before_the_pretraining_starts(
        self, pretrained: Callable[..., Pretrained]
    ) -> None:
        config, _, source = pretrained("evaluate.finetune.label_fraction=0.001")
        wanted = r"^evaluate\.finetune\.label_fraction=0\.001: leaves fewer than 2 of 160 labels"
        with pytest.raises(ConfigError, match=wanted):
            check_start(config, source)
