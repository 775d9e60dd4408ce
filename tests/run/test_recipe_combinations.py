from typing import Any

import pytest

from raysl.errors import ConfigError
from raysl.run.recipe import run_from_values

RUN: dict[str, Any] = {
    "name": "a",
    "data": {"source": "digits", "views": {"recipe": "moco_v2", "size_px": 32}},
    "method": {"name": "moco", "queue_length": 32},
    "train": {"epochs": 1, "steps": 2, "global_batch_size": 63},
    "cluster": {"num_train_workers": 2},
}


def _lines(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run_from_values(RUN | sections, where="run.yaml")
    return str(caught.value).split("\n")[1:]


def test_combinations_that_cannot_be_are_listed_all_at_once() -> None:
    found = _lines()
    assert len(found) == 3
    assert "give exactly one of train.epochs and train.steps" in found[0]
    assert "train.global_batch_size=63 does not divide over" in found[1]
    assert "method.queue_length=32 is shorter than the 63 keys of one step" in found[2]


@pytest.mark.parametrize("method", [{"name": "mocoo"}, {"queue_length": 3}, None])
def test_a_method_that_is_not_known_does_not_hide_what_else_is_wrong(method: Any) -> None:
    train = {"epochs": 1, "global_batch_size": 63, "micro_batch_size": 5}
    found = _lines(method=method, train=train)
    assert found[0].startswith("  method.name: ")
    assert "train.global_batch_size=63 does not divide over" in found[1]
    assert len(found) == 2


def test_evaluation_beside_training_needs_ray() -> None:
    given = {"train": {"steps": 2, "global_batch_size": 8}, "method": {"name": "simclr"}}
    found = _lines(**given, evaluate={"online": "background"}, cluster={"num_train_workers": 0})
    assert len(found) == 1
    assert "evaluate.online=background needs Ray" in found[0]
