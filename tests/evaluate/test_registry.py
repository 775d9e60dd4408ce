import re

import pytest

from raysl.errors import ConfigError
from raysl.evaluate.probes import KnnConfig, LbfgsConfig, LinearConfig
from raysl.evaluate.registry import (
    DEFAULT,
    FINAL,
    PROTOCOLS,
    TRANSFERRED,
    check_protocols,
    refuse_unmeasured,
    settings_digest,
)
from raysl.evaluate.training_protocols import FinetuneProtocol
from raysl.track.results import PROBES, TRAINING

# Never change a line: other defaults, or another computation, are another version with its own.
FROZEN = {
    ("knn", 1): "bb966af7dcb44ba0",
    ("linear", 1): "c0f9256683faa6bf",
    ("linear_lbfgs", 1): "7bb72c0b9201b944",
    ("linear_lbfgs", 2): "ab661d9642245ab8",
    ("few_shot", 1): "565909e229d7bd90",
    ("finetune", 1): "77d58fe96b5f219d",
    ("semi_10", 1): "2e4259b801b0acdb",
    ("semi_1", 1): "db48670e118fba54",
}


def test_the_settings_of_a_version_never_change() -> None:
    found = {(p.name, p.version): settings_digest(p.settings()) for p in PROTOCOLS.values()}
    assert found.items() <= FROZEN.items()
    assert {name for name, _ in FROZEN} == set(PROTOCOLS)


def test_results_know_the_protocols_by_name() -> None:
    assert {name for name, each in PROTOCOLS.items() if each.measure is None} == set(TRAINING)
    assert set(PROTOCOLS) == {*PROBES, *TRAINING}


def test_version_1_of_logistic_regression_is_a_setting() -> None:
    five = LbfgsConfig(inverse_penalties=(0.001, 0.01, 0.1, 1.0, 10.0))
    assert settings_digest(five) == FROZEN["linear_lbfgs", 1]


def test_a_number_is_printed_with_what_identifies_it() -> None:
    assert PROTOCOLS["knn"].text(KnnConfig()) == "knn@1 (k 20, temperature 0.07)"
    assert PROTOCOLS["knn"].text(KnnConfig(k=5)) == "knn@1 (k 5, temperature 0.07; changed: k=5)"
    assert PROTOCOLS["linear"].text(LinearConfig(base_lrs=(0.1,), sgd_momentum=0.5)) == (
        "linear@1 (SGD, 100 epochs of 256; changed: base_lrs=[0.1], sgd_momentum=0.5)"
    )
    assert PROTOCOLS["semi_1"].text(PROTOCOLS["semi_1"].settings()) == (
        "semi_1@1 (whole network, 60 epochs, 1 % of the labels)"
    )


def test_what_is_not_random_has_no_seeds() -> None:
    assert PROTOCOLS["knn"].seeds(KnnConfig(), (0, 1, 2)) == ()
    assert PROTOCOLS["linear"].seeds(LinearConfig(), (0, 1, 2)) == (0, 1, 2)
    lbfgs = PROTOCOLS["linear_lbfgs"]
    assert lbfgs.seeds(LbfgsConfig(inverse_penalties=(0.1, 1.0)), (4, 5)) == (4, 5)
    assert lbfgs.seeds(LbfgsConfig(), (4, 5)) == ()


def test_vision_transformers_have_settings_of_their_own() -> None:
    sizes = {"size_px": 32, "num_images": 1000, "seed": 3}
    plain = FinetuneProtocol(label_fraction=0.1).overrides(is_vit=False, **sizes)
    vit = FinetuneProtocol().overrides(is_vit=True, **sizes)
    assert "train.global_batch_size=100" in plain
    shared = FinetuneProtocol(label_fraction=0.1).overrides(is_vit=False, **sizes, batch_multiple=3)
    assert "train.global_batch_size=99" in shared
    assert "train.epochs=30.0" in plain
    assert any(text.startswith('optim={"name": "sgd", "base_lr": 0.05') for text in plain)
    assert "train.epochs=100.0" in vit
    assert any('"layer_decay": 0.65' in text for text in vit)
    assert not any("mixup" in text for text in plain)


def test_names_are_checked() -> None:
    assert check_protocols(["knn", "transfer", "knn"]) == ("knn", "transfer")
    assert check_protocols(DEFAULT) == DEFAULT
    assert check_protocols(FINAL) == FINAL
    assert set(TRANSFERRED) <= set(PROTOCOLS)
    with pytest.raises(ConfigError, match=r"'linaer' is not known; allowed: knn, .*mean 'linear'"):
        check_protocols(["linaer"])
    with pytest.raises(ConfigError, match="give at least one of knn"):
        check_protocols([])


class TestRefuseUnmeasured:
    @pytest.mark.parametrize(
        ("override", "names"),
        [("linear.epochs=3", ["knn"]), ("semi_1={}", ["knn"]), ("transfer.source=x", ["knn"])],
    )
    def test_settings_of_a_protocol_that_is_not_measured(
        self, override: str, names: list[str]
    ) -> None:
        section = re.split(r"[.=]", override)[0]
        wanted = f"has no effect, because {section} is not measured; .*--protocols knn,{section}"
        with pytest.raises(ConfigError, match=wanted):
            refuse_unmeasured(["seed=3", override], names)

    def test_those_of_one_that_is_are_fine(self) -> None:
        refuse_unmeasured(["knn.k=3", "data.source=x", "features.size_px=8"], ["knn"])
        refuse_unmeasured(["linear.epochs=3", "transfer.source=x"], ["transfer"])
