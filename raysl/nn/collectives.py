"""Exchange tensors and objects between workers, with correct gradients.

The only ``torch.distributed`` that methods see. In a process without a process group everything
works at no cost. Rule for gradients: each rank has its own loss, and the sum of these losses over
ranks is differentiated. Data-parallel training then divides by the number of ranks, so it minimises
the mean of the per-rank losses.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """Concatenate all ranks' rows; a row's gradient is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rank, size = rank_and_size()
        ctx.rank = rank
        gathered = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather(list(gathered.chunk(size)), rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Without this sum the loss is right and every gradient is wrong: a rank's rows also appear
        # in the denominators of the other ranks' losses.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        _, size = rank_and_size()
        mine: Tensor = total.chunk(size)[ctx.rank]
        return mine


class _SumOverRanks(torch.autograd.Function):
    """Sum a tensor over ranks; its gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def gather_batch(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of ranks, with gradients to every rank.

    Args:
        rows: ``(N, ...)``, the same shape on every rank.

    Returns:
        ``(R * N, ...)``; ``rows`` itself on a single rank.
    """
    if rank_and_size()[1] == 1:
        return rows
    return _Gather.apply(rows)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def gather_batch_no_grad(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of ranks, without gradients."""
    _, size = rank_and_size()
    if size == 1:
        return rows
    gathered = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather(list(gathered.chunk(size)), rows.contiguous())
    return gathered


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks, with gradients to every rank."""
    if rank_and_size()[1] == 1:
        return value
    return _SumOverRanks.apply(value)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over ranks, without gradients."""
    _, size = rank_and_size()
    if size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / size


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over ranks, as data-parallel training does.

    All gradients of a dtype are sent together. A parameter without a gradient must have none on any
    rank.
    """
    _, size = rank_and_size()
    if size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.reshape(-1) for gradient in same])
        dist.all_reduce(flat)
        flat /= size
        for gradient, mean in zip(same, flat.split([g.numel() for g in same]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value, a small picklable object, on every rank."""
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, small picklable objects, on every rank."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    boxes: list[Any] = [None] * size
    dist.all_gather_object(boxes, value)
    return boxes


def barrier() -> None:
    """Wait for all ranks."""
    if rank_and_size()[1] > 1:
        dist.barrier()
