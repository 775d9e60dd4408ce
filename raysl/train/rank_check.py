"""Check during a run that every rank holds the same weights, buffers and optimizer state.

Data-parallel training applies equal gradients to equal weights on every rank. A broken device, a
rank with other libraries, or a buffer that a method fills from its own images alone breaks this
without an error: the ranks train different networks, and only rank 0's is saved.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raysl.errors import RanksDifferError
from raysl.methods.base import Method
from raysl.nn.batchnorm import names_of_own_statistics
from raysl.nn.collectives import gather_batch_no_grad, gather_objects, rank_and_size
from raysl.optim.build import ScheduledOptimizer

_CHUNK = 1 << 16  # words hashed at a time: they and their products fit a CPU's cache
_WORD = 8  # bytes
_ODD = 0x5851F42D4C957F2D  # multiplier between chunks; any odd number loses nothing
_MAX_NAMED = 5

State = list[tuple[str, Tensor]]


class RankCheck:
    """Compares the state of a training between ranks, at some of its logging steps.

    Args:
        method: The method, with its teachers, queues and statistics.
        optimizers: The optimizers of its parameters.
        every: Number of logging steps between two checks; the first one is checked. None never
            checks.
    """

    def __init__(
        self, method: Method, optimizers: Sequence[ScheduledOptimizer], *, every: int | None
    ) -> None:
        self.method = method
        self.optimizers = optimizers
        self.every = every
        self._logged = 0

    def __call__(self, step: int) -> None:
        """Count a logging step, and compare the ranks if it is time. Collective.

        Args:
            step: Number of optimizer steps done, for the message.

        Raises:
            RanksDifferError: On every rank, if something differs by a bit on some rank; the message
                names the first such tensors and their ranks.
        """
        is_time = self.every is not None and self._logged % self.every == 0
        self._logged += 1
        if is_time and rank_and_size()[1] > 1:
            compare_ranks(state_of(self.method, self.optimizers), step=step)


def state_of(method: Method, optimizers: Sequence[ScheduledOptimizer]) -> State:
    """Return the tensors that must be equal on all ranks, by name.

    Running statistics of a batch norm that is not synchronised are left out: each rank has its
    own, which checkpoints and encoders average.
    """
    own = names_of_own_statistics(method)
    state = [(name, tensor.detach()) for name, tensor in method.named_parameters()]
    state += [(name, tensor) for name, tensor in method.named_buffers() if name not in own]
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for number, each in enumerate(optimizers):
        state += _optimizer_state(each.optimizer, f"optimizer {number}", names)
    return state


def _optimizer_state(
    optimizer: torch.optim.Optimizer, title: str, names: dict[int, str]
) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values: dict[str, Any] = optimizer.state.get(parameter, {})
            for key, value in sorted(values.items()):
                if isinstance(value, Tensor):
                    yield f"{title}, {key} of {names.get(id(parameter), '?')}", value


def compare_ranks(state: State, *, step: int) -> None:
    """Raise on every rank if a tensor differs by a bit on some rank. Collective.

    Usually one collective of three numbers; hashes of single tensors are exchanged only when
    something differs.

    Args:
        state: Tensors by name, in the same order on every rank.
        step: Number of optimizer steps done, for the message.

    Raises:
        RanksDifferError: If something differs.
    """
    device = state[0][1].device
    hashes = torch.stack([hash_bits(tensor).to(device) for _, tensor in state])
    kinds = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in state]
    kind = int.from_bytes(hashlib.blake2b("\n".join(kinds).encode(), digest_size=7).digest())
    total = hash_bits(hashes)
    summary = torch.stack([torch.tensor(kind, device=device), total])
    summaries = gather_batch_no_grad(summary[None]).tolist()
    if all(each == summaries[0] for each in summaries):
        return
    if any(each[0] != summaries[0][0] for each in summaries):
        lines = _of_different_kind(gather_objects(kinds))
    else:
        by_rank = gather_batch_no_grad(hashes[None]).tolist()
        lines = [
            f"{name}: {_who(values)}"
            for (name, _), values in zip(state, zip(*by_rank, strict=True), strict=True)
            if len(set(values)) > 1
        ]
    more = f"\n  and {len(lines) - _MAX_NAMED:,} more" if len(lines) > _MAX_NAMED else ""
    listed = "".join(f"\n  {line}" for line in lines[:_MAX_NAMED])
    raise RanksDifferError(
        f"after step {step}, the {len(summaries)} train workers hold different values of what must "
        f"be equal on all of them ({len(lines):,} of {len(state):,} tensors):{listed}{more}\n"
        f"A broken device or memory, other devices or libraries on one node, or a method that "
        f"fills a buffer from the images of one rank does this. The same command resumes from the "
        f"last checkpoint, with rank 0's values on all; health.check_ranks=null turns this check "
        f"off"
    )


def hash_bits(tensor: Tensor) -> Tensor:
    """Return a hash of a tensor's bits as an int64 scalar on its device.

    Each word of 8 bytes is multiplied by a random odd number of its place, so that every change of
    one word changes the sum, as does an exchange of two. Integer sums are exact in any order.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = real.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % _WORD:  # a part of another tensor
        flat = flat.clone()
    whole = len(flat) - len(flat) % _WORD
    parts = [*flat[:whole].view(torch.int64).split(_CHUNK), flat[whole:].to(torch.int64)]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    weights = _weights(flat.device)
    for part in parts:
        total = total * _ODD + (part * weights[: len(part)]).sum()
    return total


_weights_by_device: dict[torch.device, Tensor] = {}


def _weights(device: torch.device) -> Tensor:
    """Return random odd numbers, the same in every process."""
    if device not in _weights_by_device:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator)
        _weights_by_device[device] = (numbers | 1).to(device)
    return _weights_by_device[device]


def _who(values: tuple[int, ...]) -> str:
    """Say which ranks differ from most others."""
    (most, count), *_ = Counter(values).most_common(1)
    if count == 1:
        return "each rank has another value"
    others = [str(rank) for rank, value in enumerate(values) if value != most]
    named = ", ".join(others[:_MAX_NAMED]) + (", ..." if len(others) > _MAX_NAMED else "")
    return f"{'ranks' if len(others) > 1 else 'rank'} {named} unlike {count} others"


def _of_different_kind(kinds: list[list[str]]) -> list[str]:
    """Say which tensors some ranks lack, or hold in another shape or type."""
    everywhere = set(kinds[0]).intersection(*kinds[1:])
    lines: dict[str, list[int]] = {}
    for rank, each in enumerate(kinds):
        for kind in each:
            if kind not in everywhere:
                lines.setdefault(kind, []).append(rank)
    if not lines:
        return ["the same tensors, in another order"]
    return [f"{kind}: only on rank {', '.join(map(str, on))}" for kind, on in lines.items()]
