"""Build a run's network on the meta device to check that it can be built, held and trained."""

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
# Upper bounds of a node's and a GPU's memory, for machines whose memory cannot be queried here.
_NODE_BYTES, _GPU_BYTES = 4096 * _GIB, 256 * _GIB
_STATES = {"sgd": 1, "lars": 1, "adamw": 2}  # optimizer states per parameter
_FEWEST = 2  # values per channel that batch norm needs


class _OneValueError(Exception):
    """A batch norm receives one value per channel."""


def check_network(config: RunConfig[Any], source: Source, derived: Derived) -> None:
    """Check that a method can be built, fits into memory and has enough images for batch norm.

    Args:
        config: The run, with absolute paths of its files.
        source: The training images.
        derived: The derived values of the run.

    Raises:
        ConfigError: If one of these does not hold.
        DataError: If weights, head or teacher cannot be read or do not fit.
    """
    views = _view_bytes(config, derived)
    _check_memory(config, views)  # first, since the network's size may depend on the views' size
    method = _build_on_meta(config, source)
    _check_memory(config, views, method)
    for workers in config.worker_counts:
        if images_of_a_norm(config.train, config.backbone, num_workers=workers) < _FEWEST:
            _check_norms(config, method, num_workers=workers)


def _build_on_meta(config: RunConfig[Any], source: Source) -> Method:
    """Build the method with its shapes and without memory for its numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that copying weights to meta has no effect
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


def _view_bytes(config: RunConfig[Any], derived: Derived) -> int:
    """Return the bytes of a worker's batch of views: uint8, and one micro-batch as float32."""
    values = sum(3 * size**2 for size in config.view_sizes_px)
    floats = config.train.micro_batch_size or derived.batch_size_per_worker
    return values * (derived.batch_size_per_worker + _FLOAT * floats)


def _check_memory(config: RunConfig[Any], views: int, method: Method | None = None) -> None:
    """Raise ConfigError if views and network exceed memory; activations are not counted."""
    network = 0 if method is None else _network_bytes(config, method)
    available, owner = _memory(config)
    if network + views <= available:
        return
    parts = [
        f"{_gib(views)} for {len(config.view_sizes_px)} view(s) of at most "
        f"{max(config.view_sizes_px)} px of each image of a batch"
    ]
    remedy = "lower train.global_batch_size or the size of data.views"
    if method is not None and network > views:
        name, count = _largest(method)
        parts = [
            f"{_gib(network)} for weights, gradients and the states of {config.optim.name}, "
            f"most of it in {name} ({count / 1e6:,.0f} million numbers)",
            *parts,
        ]
        remedy = "lower the sizes in method or backbone"
    raise ConfigError(
        f"a train worker needs {_gib(network + views)} of memory or more, and {owner} has "
        f"{_gib(available)}: {', and '.join(parts)}; {remedy}"
    )


def _network_bytes(config: RunConfig[Any], method: Method) -> int:
    """Return the bytes of weights, gradients, optimizer states and buffers."""
    states = _STATES[config.optim.name]
    numbers = sum(p.numel() * (2 + states if p.requires_grad else 1) for p in method.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in method.buffers())
    return _FLOAT * numbers + buffers


def _largest(method: Method) -> tuple[str, int]:
    """Return the name of the largest child of a method, and its number of elements."""
    sizes = {
        name: sum(each.numel() for each in [*part.parameters(), *part.buffers()])
        for name, part in method.named_children()
    }
    direct = [*method.named_parameters(recurse=False), *method.named_buffers(recurse=False)]
    sizes |= {name: each.numel() for name, each in direct}
    return max(sizes.items(), key=lambda item: item[1])


def _memory(config: RunConfig[Any]) -> tuple[int, str]:
    """Return an upper bound of a train worker's memory in bytes, and the name of its owner."""
    is_remote = os.environ.get("RAY_ADDRESS", "local") != "local"
    if is_remote and config.cluster.uses_ray:
        return _NODE_BYTES, "no machine more than"
    total = psutil.virtual_memory().total
    if config.cluster.device != "cpu" and (count := torch.cuda.device_count()):
        return total + count * _GPU_BYTES, "this machine, with its accelerators,"
    return total, "this machine"


def _gib(number: int) -> str:
    return f"{number / _GIB:,.1f} GiB"


def _check_norms(config: RunConfig[Any], method: Method, *, num_workers: int) -> None:
    """Raise ConfigError if a batch norm would receive one value per channel.

    Other errors of this forward pass are ignored: operations after the network may not work on the
    meta device.
    """
    size = config.train.micro_batch_size or config.train.global_batch_size // num_workers
    views = [torch.empty(size, 3, side, side, device=_META) for side in config.view_sizes_px]
    rows = torch.zeros(size, dtype=torch.long, device=_META)
    progress = Progress(0, 1, 1, config.seed, is_logged=False)
    try:
        with _checked_norms(method.train(), num_workers), _META:
            method.loss(Batch(views, rows, rows), progress)
    except _OneValueError:
        part = f"backbone.name={config.backbone.name} or the head of method {config.method.name}"
        raise too_few(config.train, config.backbone, part, num_workers=num_workers) from None
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError):
        return


@contextmanager
def _checked_norms(method: nn.Module, num_workers: int) -> Iterator[None]:
    """Raise _OneValueError if a batch norm receives one value per channel."""

    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        maps = inputs[0]
        values = maps.numel() // max(1, maps.shape[1])
        if isinstance(module, SplitBatchNorm):
            values //= module.num_splits
        if isinstance(module, SyncBatchNorm):
            values *= num_workers
        if module.training and values < _FEWEST:
            raise _OneValueError

    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(check) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
