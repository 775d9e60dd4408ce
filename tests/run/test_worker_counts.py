"""The numbers of train workers that a configuration allows: one, or those of a range that work."""

from typing import Any

import pytest

from raysl.config.load import validated
from raysl.errors import ConfigError, listed
from raysl.run.cluster_config import ClusterConfig
from raysl.run.environment import flatten_mapping
from raysl.run.recipe import RunConfig, derive, derived_facts, run_from_user

BASE: dict[str, Any] = {
    "name": "a",
    "data": {"source": "digits", "views": {"recipe": "simclr", "size_px": 32}},
    "method": {"name": "simclr"},
    "train": {"steps": 2, "global_batch_size": 24},
}


def run(least: int, most: int, **more: Any) -> RunConfig[Any]:
    cluster = {"num_train_workers": {"min": least, "max": most}}
    return run_from_user(BASE | {"cluster": cluster} | more, where="test")


@pytest.mark.parametrize(
    ("least", "most", "counts"),
    [(1, 4, (1, 2, 3, 4)), (1, 5, (1, 2, 3, 4)), (2, 9, (2, 3, 4, 6, 8)), (3, 3, (3,))],
)
def test_of_a_range_those_are_used_that_divide_the_batch(
    least: int, most: int, counts: tuple[int, ...]
) -> None:
    config = run(least, most)
    assert config.worker_counts == counts
    assert config.cluster.is_elastic
    assert config.cluster.uses_ray


def test_micro_batches_split_norms_and_the_method_have_a_say() -> None:
    train = BASE["train"] | {"micro_batch_size": 6}
    assert run(1, 8, train=train).worker_counts == (1, 2, 4)
    norm = {"batch_norm": "split", "batch_norm_splits": 3}
    assert run(1, 8, backbone=norm).worker_counts == (1, 2, 4)  # four images a split, then two
    method = {"method": {"name": "byol"}}
    with pytest.raises(ConfigError, match=r"only 1 image.*Of 24 to 24 train workers, none can"):
        run(24, 24, **method)
    assert run(1, 24, **method).worker_counts[-1] == 12
    sync = {"backbone": {"batch_norm": "sync"}}
    assert run(1, 24, **method, **sync).worker_counts[-1] == 24


def test_if_the_fewest_cannot_train_the_error_names_those_that_can() -> None:
    with pytest.raises(ConfigError) as caught:
        run(5, 9)
    assert str(caught.value).splitlines()[1] == (
        "  top level: cluster.num_train_workers={min: 5, max: 9}: 5 cannot train this run: "
        "train.global_batch_size=24 does not divide over cluster.num_train_workers=5; use 20 or "
        "25. Of 5 to 9 train workers, 6 and 8 can, so set min to 6"
    )
    with pytest.raises(ConfigError, match="Of 9 to 11 train workers, none can"):
        run(9, 11)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (-1, "num_train_workers: Input should be greater than or equal to 0, got -1"),
        ("two", 'num_train_workers: Input should be a valid integer, got "two"'),
        ({"min": 0, "max": 2}, "num_train_workers.min: Input should be greater than 0, got 0"),
        ({"min": 3, "max": 2}, "num_train_workers: min is at most max; got {min: 3, max: 2}"),
        ({"max": 2}, "num_train_workers.min: missing; it has no default"),
        ({"min": 1, "max": 2, "mx": 3}, "num_train_workers: unknown key 'mx'; did you mean 'max'?"),
    ],
    ids=str,
)
def test_bad_ranges_are_told_in_one_line(given: Any, told: str) -> None:
    problems = validated(ClusterConfig, {"num_train_workers": given})
    assert isinstance(problems, list)
    assert [problem.text for problem in problems] == [told]


def test_a_dump_can_be_read_again() -> None:
    config = run(1, 4)
    values = config.model_dump(mode="json")
    assert values["cluster"]["num_train_workers"] == {"min": 1, "max": 4}
    assert run_from_user(values, where="again") == config


def test_sizes_of_a_workers_part_are_those_of_each_number_of_workers() -> None:
    config = run(1, 4)
    derived = derive(config, num_images=100)
    assert derived.batch_size_per_worker == 24  # the most memory
    facts = derived_facts(config, derived)
    sizes = {"1": 24, "2": 12, "3": 8, "4": 6}
    assert facts["batch_size_per_worker"] == facts["item_size"] == sizes
    params = flatten_mapping({"derived": facts} | config.model_dump(mode="json"))
    assert params["derived.batch_size_per_worker.3"] == 8
    assert params["cluster.num_train_workers.max"] == 4
    fixed = run_from_user(BASE | {"cluster": {"num_train_workers": 2}}, where="test")
    derived = derive(fixed, num_images=100)
    assert derived_facts(fixed, derived) == derived._asdict()
    assert derived.batch_size_per_worker == 12


@pytest.mark.parametrize(
    ("given", "multiple", "uses_ray"),
    [(0, 1, False), (1, 1, True), (6, 6, True), ({"min": 4, "max": 6}, 12, True)],
)
def test_batch_sizes_that_are_chosen_divide_over_the_fewest_and_the_most(
    given: Any, multiple: int, uses_ray: bool
) -> None:
    config = ClusterConfig.model_validate({"num_train_workers": given})
    assert (config.batch_multiple, config.uses_ray) == (multiple, uses_ray)


def test_values_are_listed_as_in_a_sentence() -> None:
    assert [listed(range(n)) for n in range(4)] == ["", "0", "0 and 1", "0, 1 and 2"]
    assert listed([1, 2], last="or") == "1 or 2"
