"""Build a run's network without memory (meta device) to check that it can be built and trained."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn

from raysl.errors import ConfigError, RayslError
from raysl.methods.base import Batch, Method, Progress
from raysl.nn.batchnorm import SplitBatchNorm, SyncBatchNorm
from raysl.run.build import build_method
from raysl.run.recipe import Derived, RunConfig, training_set
from raysl.sources.source import Source
from raysl.train.sizes import images_of_a_norm, too_few

_META = torch.device("meta")
_FLOAT, _GIB = 4, 1 << 30
# Beyond what a machine of a cluster, or one accelerator, has: for those that cannot be asked.
_MOST_OF_A_NODE, _MOST_OF_A_GPU = 4096 * _GIB, 256 * _GIB
_STATES = {"sgd": 1, "lars": 1, "adamw": 2}  # numbers that an optimizer keeps of a parameter
_FEWEST = 2


class _OneValueError(Exception):
    """A batch norm that is given one value a channel."""


def check_network(config: RunConfig[Any], source: Source, derived: Derived) -> None:
    """Refuse a method that cannot be built, held in memory or trained with so few images.

    Args:
        config: The run, with its files by absolute paths.
        source: Its training images.
        derived: What follows from both.

    Raises:
        ConfigError: If it cannot.
        DataError: If weights, head or teacher cannot be read or do not fit.
    """
    views = _bytes_of_views(config, derived)
    _refuse_too_large(config, views)  # first: the network may be laid out for views of that size
    method = _laid_out(config, source)
    _refuse_too_large(config, views, method)
    workers = max(1, config.cluster.num_train_workers)
    if images_of_a_norm(config.train, config.backbone, num_workers=workers) < _FEWEST:
        _check_norms(config, method, num_workers=workers)


def _laid_out(config: RunConfig[Any], source: Source) -> Method:
    """Build the method with all of its shapes and none of its numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that are put where there is no memory
        try:
            return build_method(config, training_set(config, source), device=_META)
        except RayslError:
            raise
        except (RuntimeError, OverflowError, TypeError, MemoryError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"method {config.method.name} on backbone.name={config.backbone.name} cannot be "
                f"built: {reason}. Look for a size in method, backbone or data.views that is far "
                f"too large"
            ) from None


def _bytes_of_views(config: RunConfig[Any], derived: Derived) -> int:
    """Return the bytes of a worker's batch of views: all of it as levels, a part as floats."""
    values = sum(3 * size**2 for size in config.view_sizes_px)
    floats = config.train.micro_batch_size or derived.batch_size_per_worker
    return values * (derived.batch_size_per_worker + _FLOAT * floats)


def _refuse_too_large(config: RunConfig[Any], views: int, method: Method | None = None) -> None:
    """Refuse what no memory holds, counted low: activations are left out."""
    network = 0 if method is None else _bytes_of_network(config, method)
    most, whose = _memory(config)
    if network + views <= most:
        return
    parts = [
        f"{_gib(views)} for {len(config.view_sizes_px)} view(s) of at most "
        f"{max(config.view_sizes_px)} px of each image of a batch"
    ]
    cure = "lower train.global_batch_size or the size of data.views"
    if method is not None and network > views:
        name, count = _largest(method)
        parts = [
            f"{_gib(network)} for weights, gradients and what {config.optim.name} keeps of them, "
            f"most of it in {name} ({count / 1e6:,.0f} million numbers)",
            *parts,
        ]
        cure = "lower the sizes in method or backbone"
    raise ConfigError(
        f"a train worker needs {_gib(network + views)} of memory or more, and {whose} has "
        f"{_gib(most)}: {', and '.join(parts)}; {cure}"
    )


def _bytes_of_network(config: RunConfig[Any], method: Method) -> int:
    states = _STATES[config.optim.name]
    numbers = sum(p.numel() * (2 + states if p.requires_grad else 1) for p in method.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in method.buffers())
    return _FLOAT * numbers + buffers


def _largest(method: Method) -> tuple[str, int]:
    """Return the part of a method that has most numbers, and how many."""
    sizes = {
        name: sum(each.numel() for each in [*part.parameters(), *part.buffers()])
        for name, part in method.named_children()
    }
    own = [*method.named_parameters(recurse=False), *method.named_buffers(recurse=False)]
    sizes |= {name: each.numel() for name, each in own}
    return max(sizes.items(), key=lambda item: item[1])


def _memory(config: RunConfig[Any]) -> tuple[int, str]:
    """Return the most memory that a train worker may have, and whose it is."""
    elsewhere = os.environ.get("RAY_ADDRESS", "local") != "local"
    if elsewhere and config.cluster.num_train_workers > 0:
        return _MOST_OF_A_NODE, "no machine more than"
    total = psutil.virtual_memory().total
    if config.cluster.device != "cpu" and (count := torch.cuda.device_count()):
        return total + count * _MOST_OF_A_GPU, "this machine, with its accelerators,"
    return total, "this machine"


def _gib(number: int) -> str:
    return f"{number / _GIB:,.1f} GiB"


def _check_norms(config: RunConfig[Any], method: Method, *, num_workers: int) -> None:
    """Refuse a forward pass whose batch norm would get one value a channel.

    Whatever else cannot be done without numbers comes after the network, and is nothing to say.
    """
    size = config.train.micro_batch_size or config.train.global_batch_size // num_workers
    views = [torch.empty(size, 3, side, side, device=_META) for side in config.view_sizes_px]
    rows = torch.zeros(size, dtype=torch.long, device=_META)
    progress = Progress(0, 1, 1, config.seed, is_logged=False)
    try:
        with _counted(method.train(), num_workers), _META:
            method.loss(Batch(views, rows, rows), progress)
    except _OneValueError:
        what = f"backbone.name={config.backbone.name} or the head of method {config.method.name}"
        raise too_few(config.train, config.backbone, what, num_workers=num_workers) from None
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError):
        return


@contextmanager
def _counted(method: nn.Module, num_workers: int) -> Iterator[None]:
    """Raise where a batch norm is given one value a channel."""

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        maps = inputs[0]
        values = maps.numel() // max(1, maps.shape[1])
        if isinstance(module, SplitBatchNorm):
            values //= module.num_splits
        if isinstance(module, SyncBatchNorm):
            values *= num_workers
        if module.training and values < _FEWEST:
            raise _OneValueError

    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
