"""Check that batch, workers and micro-batches fit each other."""

from typing import Any

from raysl.errors import ConfigError, counted
from raysl.methods import load_method
from raysl.methods.base import MethodConfig
from raysl.nn.backbones import BackboneConfig
from raysl.train.gradient import can_split
from raysl.train.loop import TrainConfig

_FEWEST = 2  # images that batch statistics need at least


def check_sizes(
    train: TrainConfig, backbone: BackboneConfig, method: MethodConfig | None, *, num_workers: int
) -> None:
    """Reject a batch that the workers cannot share equally, or with parts too small for the method.

    Args:
        train: The sizes of the batch and its micro-batches.
        backbone: The scope of batch norm: the images over which it computes its statistics.
        method: The method's settings; None if unknown.
        num_workers: Number of workers that share the batch.

    Raises:
        ConfigError: With sizes that would work.
    """
    batch = train.global_batch_size
    if batch % num_workers:
        near = sorted(
            {
                max(num_workers, batch // num_workers * num_workers),
                -(-batch // num_workers) * num_workers,
            }
        )
        raise ConfigError(
            f"train.global_batch_size={batch} does not divide over "
            f"cluster.num_train_workers={num_workers}; use {' or '.join(map(str, near))}"
        )
    _check_splits(train, backbone, per_worker=batch // num_workers)
    if method is None:
        return
    _check_micro_batch(train, method, per_worker=batch // num_workers)
    if method.norms_images:
        _check_norms(train, backbone, method, num_workers=num_workers)


def images_of_a_norm(train: TrainConfig, backbone: BackboneConfig, *, num_workers: int) -> int:
    """Return the number of images over which batch norm computes its statistics in a pass."""
    size = train.micro_batch_size or train.global_batch_size // num_workers
    if backbone.batch_norm == "sync":
        return size * num_workers
    return size // backbone.batch_norm_splits if backbone.batch_norm == "split" else size


def too_few(
    train: TrainConfig, backbone: BackboneConfig, what: str, *, num_workers: int
) -> ConfigError:
    """Build the error for statistics over a single image, with sizes that work.

    Args:
        train: The sizes of the batch and its micro-batches.
        backbone: The scope of batch norm: the images over which it computes its statistics.
        what: What computes the statistics, such as "method byol".
        num_workers: Number of workers that share the batch.
    """
    splits = backbone.batch_norm_splits if backbone.batch_norm == "split" else 1
    least, per_worker = _FEWEST * splits, train.global_batch_size // num_workers
    batch, micro = train.global_batch_size, train.micro_batch_size
    setting = f"train.global_batch_size={batch}"
    if num_workers > 1:
        setting += f" over cluster.num_train_workers={num_workers}"
    least_batch = (
        max(_FEWEST, num_workers) if backbone.batch_norm == "sync" else least * num_workers
    )
    remedies = [f"train.global_batch_size={least_batch} or more"]
    if micro is not None:
        setting = f"train.micro_batch_size={micro}"
        sizes = [n for n in range(least, per_worker + 1) if per_worker % n == 0 and n % splits == 0]
        remedies = [f"train.micro_batch_size={sizes[0]} or null"] if sizes else remedies
    if splits > 1 and min(micro or per_worker, per_worker) >= _FEWEST:
        remedies.append(f"backbone.batch_norm_splits={(micro or per_worker) // _FEWEST}")
    if backbone.batch_norm == "worker" and num_workers > 1:
        remedies.append("backbone.batch_norm=sync")
    part = f"one of backbone.batch_norm_splits={splits}" if splits > 1 else "a forward pass"
    return ConfigError(
        f"{setting}: {what} has batch norm whose statistics are of all images of {part}, which has "
        f"only {counted(1, 'image')}; use {', or '.join(remedies)}"
    )


def _check_splits(train: TrainConfig, backbone: BackboneConfig, *, per_worker: int) -> None:
    splits, size = backbone.batch_norm_splits, train.micro_batch_size
    if backbone.batch_norm != "split":
        return
    if per_worker % splits:
        raise ConfigError(
            f"a worker's batch of {per_worker} does not divide into "
            f"backbone.batch_norm_splits={splits}"
        )
    if size is not None and size % splits:
        raise ConfigError(
            f"train.micro_batch_size={size} does not divide into "
            f"backbone.batch_norm_splits={splits}"
        )


def _check_micro_batch(train: TrainConfig, method: MethodConfig, *, per_worker: int) -> None:
    size = train.micro_batch_size
    if size is None:
        return
    if not can_split(load_method(method.name)):
        raise ConfigError(
            f"train.micro_batch_size={size}: the loss of method {method.name} can neither "
            f"be cached nor accumulated; set it to null and lower train.global_batch_size"
        )
    if per_worker % size:
        raise ConfigError(
            f"train.micro_batch_size={size} does not divide a worker's batch of {per_worker}"
        )


def _check_norms(
    train: TrainConfig, backbone: BackboneConfig, method: Any, *, num_workers: int
) -> None:
    if images_of_a_norm(train, backbone, num_workers=num_workers) < _FEWEST:
        raise too_few(train, backbone, f"the head of method {method.name}", num_workers=num_workers)
