"""Batch norm with statistics of all workers, of this worker, or of parts of its batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.nn.collectives import mean_over_ranks, rank_and_size, sum_over_ranks
from raysl.nn.precision import at_least_float32

BatchNormScope = Literal["worker", "sync", "split"]
_BatchNorm = nn.modules.batchnorm._BatchNorm


class _AnyDimBatchNorm(_BatchNorm):
    """Takes ``(N, C, ...)`` of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ShapeError(f"expected (N, C, ...); got {tuple(input.shape)}")


class SyncBatchNorm(_AnyDimBatchNorm):
    """Batch normalisation with the statistics of all ranks, on any device.

    Torch's own SyncBatchNorm only has kernels for accelerators and rejects CPU tensors. This one
    sums over ranks twice (the mean, then centred squares, to avoid cancellation); the gradients are
    sums over ranks too. On CUDA the torch module is used instead.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167v3, Algorithm 1, with the batch of all workers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)``, in training by the statistics of the global batch."""
        self._check_input_dim(input)
        _, size = rank_and_size()
        if not self.training or size == 1:
            tracks = self.track_running_stats or not self.training
            return F.batch_norm(
                input,
                self.running_mean if tracks else None,
                self.running_var if tracks else None,
                self.weight,
                self.bias,
                self.training,
                self._next_momentum() if tracks else 0.0,
                self.eps,
            )
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = at_least_float32(input)
        count = x.numel() / x.shape[1] * size
        mean = sum_over_ranks(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._update(mean.detach(), variance.detach() * count / (count - 1))
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    def _next_momentum(self) -> float:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return 0.1 if self.momentum is None else self.momentum

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        momentum = self._next_momentum()
        cast(Tensor, self.running_mean).lerp_(mean, momentum)
        cast(Tensor, self.running_var).lerp_(variance, momentum)


class SplitBatchNorm(_AnyDimBatchNorm):
    """Batch normalisation over equal parts of a worker's batch, as if each were on its own GPU.

    MoCo needs statistics of small groups; this provides them on a single worker. The running
    statistics are the mean over the parts.

    Source: The MoCo authors' CIFAR-10 demonstration (moco_cifar10_demo.ipynb).
    """

    num_splits: int = 1

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)`` part by part in training; the number of parts must divide N."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        n, channels, *rest = input.shape
        parts = self.num_splits
        if n % parts:
            raise ShapeError(f"a batch of {n} does not divide into {parts} batch-norm splits")
        # Part p takes n / parts contiguous rows from p * n / parts. Its channels become separate
        # channels, so that one call normalises all parts.
        folded = input.view(parts, n // parts, channels, *rest).transpose(0, 1)
        folded = folded.reshape(n // parts, parts * channels, *rest)
        mean = cast(Tensor, self.running_mean).repeat(parts)
        variance = cast(Tensor, self.running_var).repeat(parts)
        momentum = 0.1 if self.momentum is None else self.momentum
        normalised = F.batch_norm(
            folded,
            mean,
            variance,
            self.weight.repeat(parts) if self.affine else None,
            self.bias.repeat(parts) if self.affine else None,
            True,
            momentum,
            self.eps,
        )
        if self.track_running_stats:
            with torch.no_grad():
                cast(Tensor, self.running_mean).copy_(mean.view(parts, channels).mean(0))
                cast(Tensor, self.running_var).copy_(variance.view(parts, channels).mean(0))
                cast(Tensor, self.num_batches_tracked).add_(1)
        unfolded = normalised.view(n // parts, parts, channels, *rest).transpose(0, 1)
        return unfolded.reshape(input.shape)


def set_batch_norm_scope(
    module: nn.Module, scope: BatchNormScope, *, num_splits: int = 1, on_cuda: bool = False
) -> nn.Module:
    """Replace every batch norm in ``module`` by the given scope's; parameters are shared.

    Args:
        module: Any module; changed in place if it has children.
        scope: ``worker`` restores ordinary batch norm, ``sync`` uses the batch of all workers,
            ``split`` uses ``num_splits`` parts of the worker's batch.
        num_splits: Number of parts for ``split``, > 0.
        on_cuda: Whether the module will run on CUDA, where torch's own SyncBatchNorm is faster.

    Raises:
        ConfigError: If the scope is unknown.
    """
    if scope not in ("worker", "sync", "split"):
        raise ConfigError(f"batch norm scope {scope!r}; allowed: worker, sync, split")
    if scope == "sync" and on_cuda:
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(module))
    if isinstance(module, _BatchNorm):
        if scope == "worker":  # one part is the whole batch
            is_special = isinstance(module, SyncBatchNorm | nn.SyncBatchNorm | SplitBatchNorm)
            return _convert(module, SplitBatchNorm, 1) if is_special else module
        return _convert(module, SyncBatchNorm if scope == "sync" else SplitBatchNorm, num_splits)
    for name, child in module.named_children():
        replaced = set_batch_norm_scope(child, scope, num_splits=num_splits)
        if replaced is not child:
            setattr(module, name, replaced)
    return module


def _convert(old: Any, kind: type[Any], num_splits: int) -> nn.Module:
    new = kind(
        old.num_features,
        eps=old.eps,
        momentum=old.momentum,
        affine=old.affine,
        track_running_stats=old.track_running_stats,
    )
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    for name, buffer in old.named_buffers(recurse=False):
        new.register_buffer(name, buffer)
    if kind is SplitBatchNorm:
        new.num_splits = num_splits
    new.train(old.training)
    return cast(nn.Module, new)


def names_of_own_statistics(module: nn.Module) -> set[str]:
    """Return the names of the running statistics that each rank takes from its own images."""
    return {
        f"{name}.{buffer}" if name else buffer
        for name, norm in module.named_modules()
        if isinstance(norm, _BatchNorm) and not isinstance(norm, SyncBatchNorm | nn.SyncBatchNorm)
        for buffer in ("running_mean", "running_var")
    }


@contextmanager
def untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Freeze the running statistics within the block; training still uses the batch's."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Average the running batch-norm statistics over ranks.

    Each rank's running statistics come from its own images. They never enter the training loss, so
    this only changes evaluation and saved encoders.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            for buffer in (norm.running_mean, norm.running_var):
                assert buffer is not None
                buffer.copy_(mean_over_ranks(buffer))
