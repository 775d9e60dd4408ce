"""Contrastive losses without the matrix of all pairs, and the queue of negative keys.

NT-Xent, InfoNCE and the sigmoid loss compare each of M rows with each of K keys. Here the M x K
similarities are computed tile by tile, and again for the gradient, so that memory grows with M + K.
Gradients of rows and keys are exact. If one tile holds all pairs, it is kept for the gradient.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.nn.precision import at_least_float32

CPU_TILE, DEVICE_TILE = 1024, 4096
"""Side of a tile: 4 MiB of float32 stay in a CPU's cache; on a GPU 64 MiB, because each tile costs
a few kernel launches there. With fewer rows, a tile takes more keys."""


class Contrast(NamedTuple):
    """How well rows are distinguished from their negatives."""

    loss: Tensor
    """Scalar, the mean over rows."""
    partner_top1: Tensor
    """Share of rows whose positive is closer than every negative; detached."""


def unit_rows(z: Tensor) -> Tensor:
    """Scale rows to length 1, in float32 (float64 stays), also under autocast."""
    with torch.autocast(z.device.type, enabled=False):
        return F.normalize(at_least_float32(z), dim=-1)


def contrast(
    rows: Tensor,
    positives: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    excluded: Tensor | None = None,
    memory: Tensor | None = None,
    tile: int | None = None,
) -> Contrast:
    r"""Compute the cross entropy of each row's positive against the keys.

    .. math::
        \ell_i = -\log \frac{\exp(r_i \cdot p_i/\tau)}
                            {\exp(r_i \cdot p_i/\tau) + \sum_k \exp(r_i \cdot k/\tau)}

    Args:
        rows: ``(M, D)`` from :func:`unit_rows`.
        positives: ``(M, D)`` from :func:`unit_rows`: the key that matches each row.
        keys: ``(K, D)`` from :func:`unit_rows`: the negatives. Those of other workers come from
            ``gather_batch``, which returns their gradient to them.
        temperature: Tau, > 0.
        excluded: ``(M, E)`` int64: for each row, the keys that are not its negatives (itself, its
            positive). None if all are.
        memory: ``(K', D)`` more negatives, from :func:`unit_rows`.
        tile: Side of a tile; None takes :data:`CPU_TILE` or :data:`DEVICE_TILE`.

    Returns:
        The loss, >= 0 and 0 for a row without negatives, with gradients for those of rows,
        positives, keys and memory that require them; and how often the positive ranks first.

    Raises:
        ShapeError: If the shapes do not fit.
    """
    _check(rows, positives, keys, memory)
    tile = tile or _tile_for(rows)
    with torch.autocast(rows.device.type, enabled=False):
        scaled = rows / temperature
        positive = (scaled * positives).sum(dim=1)
        negative, nearest = _LogSumExp.apply(scaled, keys, excluded, tile)  # type: ignore[no-untyped-call]
        if memory is not None:
            memory_sum, memory_nearest = _LogSumExp.apply(scaled, memory.to(rows.dtype), None, tile)  # type: ignore[no-untyped-call]
            negative = torch.logaddexp(negative, memory_sum)
            nearest = torch.maximum(nearest, memory_nearest)
        # -log(e^p / (e^p + e^n)), accurate even if p is much larger than n.
        loss = -F.logsigmoid(positive - negative).mean()
    return Contrast(loss, (positive.detach() > nearest).float().mean())


def log_sum_exp(
    rows: Tensor, keys: Tensor, *, temperature: float, tile: int | None = None
) -> Tensor:
    """Return each row's log of the sum of exp(row . key / temperature) over the keys, ``(M,)``.

    Args:
        rows: ``(M, D)``; gradients of rows and keys are exact.
        keys: ``(K, D)``.
        temperature: > 0.
        tile: Side of a tile; None takes :data:`CPU_TILE` or :data:`DEVICE_TILE`.
    """
    scaled = rows / temperature
    total: Tensor
    total, _ = _LogSumExp.apply(scaled, keys, None, tile or _tile_for(rows))  # type: ignore[no-untyped-call]
    return total


def pairwise_sigmoid(
    rows: Tensor,
    positives: Tensor,
    keys: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    excluded: Tensor,
    tile: int | None = None,
) -> Contrast:
    r"""Compute the binary cross entropy of every row with every key; only its positive matches.

    .. math::
        \ell_i = \log(1 + \exp(-(s\, r_i \cdot p_i + b)))
                 + \sum_k \log(1 + \exp(s\, r_i \cdot k + b))

    Args:
        rows: ``(M, D)`` from :func:`unit_rows`.
        positives: ``(M, D)`` from :func:`unit_rows`: the key that matches each row.
        keys: ``(K, D)`` from :func:`unit_rows`: the negatives.
        scale: Scalar factor on similarities, with gradient.
        bias: Scalar added after scaling, with gradient.
        excluded: ``(M, E)`` int64: for each row, the keys that are not its negatives.
        tile: Side of a tile; None takes :data:`CPU_TILE` or :data:`DEVICE_TILE`.

    Raises:
        ShapeError: If the shapes do not fit.
    """
    _check(rows, positives, keys, None)
    tile = tile or _tile_for(rows)
    with torch.autocast(rows.device.type, enabled=False):
        scaled = rows * scale
        positive = (scaled * positives).sum(dim=1)
        # An extra column carries the bias and its gradient: [s r, b] . [k, 1] = s r . k + b.
        rows_and_bias = torch.cat([scaled, bias.to(rows.dtype).expand(len(rows), 1)], dim=1)
        keys_and_one = torch.cat([keys, keys.new_ones(len(keys), 1)], dim=1)
        negative, nearest = _SoftplusSum.apply(rows_and_bias, keys_and_one, excluded, tile)  # type: ignore[no-untyped-call]
        loss = (negative - F.logsigmoid(positive + bias)).mean()
    is_nearest = (positive + bias).detach() > nearest
    return Contrast(loss, is_nearest.float().mean())


def _check(rows: Tensor, positives: Tensor, keys: Tensor, memory: Tensor | None) -> None:
    negatives = [keys] if memory is None else [keys, memory]
    fits = rows.ndim == 2 and rows.shape == positives.shape
    if not fits or any(k.ndim != 2 or k.shape[1] != rows.shape[1] for k in negatives):
        shapes = ", ".join(str(tuple(x.shape)) for x in (rows, positives, *negatives))
        raise ShapeError(f"rows and positives must be (M, D) and keys (K, D); got {shapes}")


def _tile_for(rows: Tensor) -> int:
    return CPU_TILE if rows.device.type == "cpu" else DEVICE_TILE


class _Tile(NamedTuple):
    """A block of the similarities: its rows, its keys, and the values."""

    rows: slice
    keys: slice
    values: Tensor


def _tiles(rows: Tensor, keys: Tensor, excluded: Tensor | None, tile: int) -> Iterator[_Tile]:
    """Yield the similarities of rows and keys, writable; excluded pairs are -inf."""
    height = max(1, min(tile, len(rows)))
    width = tile**2 // height  # with few rows, more keys at once
    for first_row in range(0, len(rows), height):
        row_slice = slice(first_row, first_row + height)
        for first_key in range(0, len(keys), width):
            key_slice = slice(first_key, first_key + width)
            values = rows[row_slice] @ keys[key_slice].T
            for column in () if excluded is None else excluded[row_slice].T:
                _exclude(values, column - first_key)
            yield _Tile(row_slice, key_slice, values)


def _exclude(values: Tensor, column: Tensor) -> None:
    """Write -inf at each row's column if the tile contains it, without waiting for the device."""
    last = values.shape[1] - 1
    index = column.clamp(0, last)[:, None]
    inside = (column >= 0) & (column <= last)
    values.scatter_(1, index, values.gather(1, index).masked_fill(inside[:, None], float("-inf")))


def _gradients(
    ctx: Any, tiles: Iterator[_Tile], weights: Tensor, rows: Tensor, keys: Tensor
) -> tuple[Tensor | None, ...]:
    """Sum up the gradients of rows and keys.

    Args:
        ctx: The autograd context; it knows which gradients are required.
        tiles: The gradient of the similarities, without each row's factor.
        weights: Each row's factor, ``(M,)``: cheaper to apply to the result than to all pairs.
        rows: ``(M, D)``.
        keys: ``(K, D)``.
    """
    to_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
    to_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
    weighted = rows * weights[:, None]
    for part in tiles:
        if to_rows is not None:
            to_rows[part.rows].addmm_(part.values, keys[part.keys])
        if to_keys is not None:
            to_keys[part.keys].addmm_(part.values.T, weighted[part.rows])
    if to_rows is not None:
        to_rows.mul_(weights[:, None])
    return to_rows, to_keys, None, None


class _LogSumExp(torch.autograd.Function):
    """Each row's log of the sum of exponentials over its keys, and its largest similarity."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor, excluded: Tensor | None, tile: int
    ) -> tuple[Tensor, Tensor]:
        total = rows.new_full((len(rows),), float("-inf"))
        largest = total.clone()
        powers, sums = None, total  # kept if one tile holds all pairs
        for part in _tiles(rows, keys, excluded, tile):
            top = part.values.amax(dim=1)
            shift = top.masked_fill(top == float("-inf"), 0.0)  # without any key: log 0, not nan
            powers = part.values.sub_(shift[:, None]).exp_()
            sums = powers.sum(dim=1)
            total[part.rows] = torch.logaddexp(total[part.rows], sums.log() + shift)
            largest[part.rows] = torch.maximum(largest[part.rows], top)
        if powers is not None and powers.shape != (len(rows), len(keys)):
            powers = None
        ctx.tile = tile
        ctx.save_for_backward(rows, keys, excluded, total, powers, sums)
        ctx.mark_non_differentiable(largest)
        return total, largest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, excluded, total, powers, sums = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            if powers is not None:
                single_tile = _Tile(slice(0, None), slice(0, None), powers)
                weights = gradients[0] / sums.clamp_min(torch.finfo(sums.dtype).tiny)
                return _gradients(ctx, iter([single_tile]), weights, rows, keys)
            shift = total.masked_fill(total == float("-inf"), 0.0)
            tiles = (
                part._replace(values=part.values.sub_(shift[part.rows, None]).exp_())
                for part in _tiles(rows, keys, excluded, ctx.tile)
            )
            return _gradients(ctx, tiles, gradients[0], rows, keys)


class _SoftplusSum(torch.autograd.Function):
    """Each row's sum of log(1 + exp) over its keys, and its largest similarity."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor, excluded: Tensor, tile: int
    ) -> tuple[Tensor, Tensor]:
        total = rows.new_zeros(len(rows))
        largest = rows.new_full((len(rows),), float("-inf"))
        for part in _tiles(rows, keys, excluded, tile):
            total[part.rows] += F.softplus(part.values).sum(dim=1)
            largest[part.rows] = torch.maximum(largest[part.rows], part.values.amax(dim=1))
        ctx.tile = tile
        ctx.save_for_backward(rows, keys, excluded)
        ctx.mark_non_differentiable(largest)
        return total, largest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, excluded = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            tiles = (
                part._replace(values=part.values.sigmoid_())
                for part in _tiles(rows, keys, excluded, ctx.tile)
            )
            return _gradients(ctx, tiles, gradients[0], rows, keys)


class KeyQueue(nn.Module):
    """The newest K keys of all workers, used as negatives; identical on every worker.

    Args:
        length: K.
        dim: D.
    """

    keys: Tensor
    place: Tensor
    put_at_step: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("put_at_step", torch.full((length,), -1, dtype=torch.long))

    @torch.no_grad()
    def put(self, keys: Tensor, *, step: int) -> None:
        """Replace the oldest keys by those of a step, ``(M, D)`` with M <= K."""
        length = len(self.keys)
        slots = (self.place + torch.arange(len(keys), device=keys.device)) % length
        self.keys[slots] = keys.to(self.keys.dtype)
        self.put_at_step[slots] = step
        self.place.copy_((self.place + len(keys)) % length)

    @torch.no_grad()
    def age_steps(self, step: int) -> Tensor:
        """Return how many steps ago the oldest key was added, as float32; 0 while it is empty."""
        put = self.put_at_step
        return (step - torch.where(put >= 0, put, step).amin()).float()


def check_queue_length(
    field: str, length: int, *, keys_per_step: int, num_images: int | None = None
) -> None:
    """Reject a queue too short for a step's keys, or longer than the data set.

    Args:
        field: Name of the setting for messages, such as ``method.queue_length``.
        length: Length of the queue, in keys.
        keys_per_step: Number of keys that each step adds.
        num_images: Number of training images; None if not known yet.

    Raises:
        ConfigError: If it is shorter than the keys of a step, or longer than the data set.
    """
    if length < keys_per_step:
        raise ConfigError(
            f"{field}={length} is shorter than the {keys_per_step} keys of one step; use at least "
            f"{keys_per_step}, or a smaller train.global_batch_size"
        )
    if num_images is not None and length > num_images:
        raise ConfigError(
            f"{field}={length} is more than the {num_images} training images: old keys of an image "
            f"would be negatives of that image; use at most {num_images}, or null"
        )
