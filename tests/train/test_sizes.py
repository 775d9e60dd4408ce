import pytest

from raysl.errors import ConfigError
from raysl.methods.byol import BYOLConfig
from raysl.methods.moco import MoCoConfig
from raysl.nn.backbones import BackboneConfig
from raysl.train.loop import TrainConfig
from raysl.train.sizes import check_sizes, images_of_a_norm


def _check(
    batch: int,
    *,
    workers: int = 1,
    micro: int | None = None,
    norm: str = "worker",
    splits: int = 8,
    method: BYOLConfig | MoCoConfig | None = None,
) -> None:
    check_sizes(
        TrainConfig(steps=1, global_batch_size=batch, micro_batch_size=micro),
        BackboneConfig(name="resnet18", batch_norm=norm, batch_norm_splits=splits),  # type: ignore[arg-type]
        method or BYOLConfig(),
        num_workers=workers,
    )


@pytest.mark.parametrize(
    ("batch", "workers", "micro", "norm", "splits", "images"),
    [
        (8, 1, None, "worker", 8, 8),
        (8, 4, None, "worker", 8, 2),
        (8, 4, None, "sync", 8, 8),
        (8, 2, 1, "sync", 8, 2),
        (8, 1, 2, "worker", 8, 2),
        (16, 1, None, "split", 4, 4),
        (16, 2, 4, "split", 4, 1),
    ],
)
def test_batch_norm_sees_its_part_of_a_forward_pass(
    batch: int, workers: int, micro: int | None, norm: str, splits: int, images: int
) -> None:
    train = TrainConfig(steps=1, global_batch_size=batch, micro_batch_size=micro)
    backbone = BackboneConfig(name="resnet18", batch_norm=norm, batch_norm_splits=splits)  # type: ignore[arg-type]
    assert images_of_a_norm(train, backbone, num_workers=workers) == images


def test_two_images_of_a_norm_are_enough() -> None:
    _check(2)
    _check(4, workers=2)
    _check(2, workers=2, norm="sync")
    _check(8, micro=2)
    _check(16, norm="split")


def test_one_is_enough_for_a_head_without_batch_norm() -> None:
    _check(1, method=MoCoConfig())
    _check(4, micro=None, workers=4, method=MoCoConfig())


@pytest.mark.parametrize(
    ("sizes", "cures"),
    [
        ({"batch": 1}, "use train.global_batch_size=2 or more"),
        (
            {"batch": 4, "workers": 4},
            "use train.global_batch_size=8 or more, or backbone.batch_norm=sync",
        ),
        ({"batch": 1, "norm": "sync"}, "use train.global_batch_size=2 or more"),
        ({"batch": 9, "micro": 1}, "use train.micro_batch_size=3 or null"),
        (
            {"batch": 8, "norm": "split"},
            "use train.global_batch_size=16 or more, or backbone.batch_norm_splits=4",
        ),
        (
            {"batch": 8, "micro": 4, "norm": "split", "splits": 4},
            "use train.micro_batch_size=8 or null, or backbone.batch_norm_splits=2",
        ),
    ],
)
def test_one_is_refused_with_the_sizes_that_work(sizes: dict[str, int], cures: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _check(**sizes)  # type: ignore[arg-type]
    assert "the head of method byol has batch norm whose statistics are of" in str(caught.value)
    assert str(caught.value).endswith(cures)


@pytest.mark.parametrize(
    "sizes", [{"batch": 8, "workers": 3}, {"batch": 8, "micro": 3}, {"batch": 12, "norm": "split"}]
)
def test_what_does_not_divide_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        _check(**sizes)  # type: ignore[arg-type]
