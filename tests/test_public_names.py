"""The names that code outside this repository imports keep their place and their arguments."""

import importlib
import inspect

import pytest
import torch

import raysl
from raysl.errors import ShapeError
from raysl.evaluate.knn import knn_accuracy
from raysl.evaluate.probes import KnnConfig, ProbeSets, measure_knn

NAMES = {
    "raysl.methods.simclr.nt_xent_loss": "z0 z1 temperature",
    "raysl.methods.moco.info_nce_loss": "query key queue temperature",
    "raysl.methods.sigmoid.sigmoid_loss": "z0 z1 temperature bias",
    "raysl.methods.margin.margin_loss": "z0 z1 dissimilar margin",
    "raysl.methods.nce.nce_loss": (
        "data_logits noise_logits data_log_noise noise_log_noise num_noise"
    ),
    "raysl.methods.dino.dino_loss": (
        "student teacher center student_temperature teacher_temperature"
    ),
    "raysl.methods.mae.patchify": "images patch_size",
    "raysl.methods.mae.masked_mse": "prediction target mask normalize",
    "raysl.methods.byol.byol_loss": "",
    "raysl.methods.vicreg.vicreg_loss": "z0 z1 similarity variance covariance",
    "raysl.methods.barlow.barlow_loss": "z0 z1 redundancy",
    "raysl.optim.lars.LARS": "params lr momentum weight_decay trust_coefficient",
    "raysl.evaluate.knn.knn_accuracy": (
        "train_features train_labels test_features test_labels k temperature"
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_takes_its_arguments(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    assert set(NAMES[name].split()) <= set(parameters)


@pytest.mark.parametrize("name", ["pretrain", "load_encoder", "load_classifier"])
def test_the_package_offers_its_functions(name: str) -> None:
    assert callable(getattr(raysl, name))


def test_knn_accuracy_is_that_of_the_protocol() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(40, 6, generator=generator), torch.randn(25, 6, generator=generator)
    labels, test_labels = (torch.randint(3, (count,), generator=generator) for count in (40, 25))
    sets = ProbeSets(train.numpy(), labels.numpy(), test.numpy(), test_labels.numpy())
    config = KnnConfig(k=7, temperature=0.2)
    measured = measure_knn(config, sets, seed=0, device="cpu").top1
    assert knn_accuracy(train, labels, test, test_labels, k=7, temperature=0.2) == measured
    assert 0.0 < measured < 1.0
    with pytest.raises(ShapeError):
        knn_accuracy(train, labels[:-1], test, test_labels, k=7, temperature=0.2)
