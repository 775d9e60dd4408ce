"""Gradients of an image's energy, Langevin dynamics, and the replay buffer of its chains."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysl.nn.collectives import gather_batch_no_grad, rank_and_size

Energy = Callable[[Tensor], Tensor]
"""Maps ``(N, 3, S, S)`` to ``(N,)``; row i depends on image i only."""


@contextmanager
def standing_still(network: nn.Module) -> Iterator[None]:
    """Make a network a function of single images in the block: batch norm in eval, no dropout."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def energy_gradient(energy: Energy, images: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of each image's energy with respect to its pixels, ``(N, 3, S, S)``.

    No parameter's ``grad`` changes, and data-parallel training is not triggered.

    Args:
        energy: Each image's energy.
        images: Where to evaluate the gradient; not changed.
        create_graph: Whether the gradient will itself be differentiated.
    """
    with torch.enable_grad():
        place = images.detach().requires_grad_()
        gradient = torch.autograd.grad(energy(place).sum(), place, create_graph=create_graph)
    return gradient[0]


@torch.no_grad()
def langevin(
    energy: Energy,
    images: Tensor,
    *,
    num_steps: int,
    step_size: float,
    noise_std: float,
    max_gradient: float = math.inf,
    value_range: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[Tensor, Tensor]:
    r"""Run Langevin dynamics: gradient descent on the energy with noise.

    .. math::
        x \leftarrow \mathrm{clamp}(x - a\, \mathrm{clip}(\nabla_x E(x)) + s\, n),
        \qquad n \sim N(0, 1)

    With s = sqrt(2 a), small a and no clipping, the chains converge to samples of exp(-E) / Z.

    Args:
        energy: Each image's energy.
        images: Where the chains start, ``(N, 3, S, S)``; not changed.
        num_steps: Steps, >= 0.
        step_size: a, > 0.
        noise_std: s, >= 0.
        max_gradient: Bound on the absolute value of each pixel's gradient, > 0.
        value_range: Lowest and highest value of a pixel.

    Returns:
        The samples, detached, and the norm of each one's gradient at the last step, ``(N,)``,
        before clipping.

    Source: Welling and Teh, ICML 2011, eq. (4), with independent step and noise, as in
    arXiv:1903.08689v6 and arXiv:1912.03263v3; the clipping is that of the former's code
    (openai/ebm_code_release, train.py:760).
    """
    lengths = images.new_zeros(len(images))
    for _ in range(num_steps):
        gradient = energy_gradient(energy, images)
        lengths = gradient.flatten(1).norm(dim=1)
        images = images - step_size * gradient.clamp(-max_gradient, max_gradient)
        if noise_std > 0:
            images = images + noise_std * torch.randn_like(images)
        images = images.clamp(*value_range)
    return images, lengths


class ChainStarts(NamedTuple):
    """The starting points of a step's chains."""

    images: Tensor  # (N, 3, S, S): of this rank
    fresh: Tensor  # (N,) bool: which start from noise
    slots: Tensor  # (R * N,) int64: buffer rows for all ranks' samples
    restarted: Tensor  # (R * N,) bool: which start from noise
    num_steps: Tensor  # (R * N,) int32: steps done by each chain


class ReplayBuffer(nn.Module):
    """The last samples of many chains, identical on every rank.

    The generator alone determines which chains continue, which restart and from which noise, for
    any number of ranks. It takes ``2 * length * 3 * size_px ** 2`` bytes, also in a checkpoint: 61
    MB for 10,000 images of 32 px, 3 GB for 224 px.

    Args:
        length: Number of chains.
        size_px: Side of the images.
        value_range: Range of the uniform noise that chains start from.
    """

    samples: Tensor
    num_steps: Tensor

    def __init__(self, length: int, size_px: int, value_range: tuple[float, float]) -> None:
        super().__init__()
        self.value_range = value_range
        shape = (length, 3, size_px, size_px)
        self.register_buffer("samples", torch.empty(shape, dtype=torch.half).uniform_(*value_range))
        self.register_buffer("num_steps", torch.zeros(length, dtype=torch.int32))

    def starts(self, count: int, *, restart_prob: float, generator: torch.Generator) -> ChainStarts:
        """Draw a rank's chains, each from a different slot.

        Args:
            count: N, chains of this rank, the same on every rank; R * N at most the length.
            restart_prob: Probability that a chain restarts from noise.
            generator: On the CPU, in the same state on every rank.
        """
        rank, size = rank_and_size()
        slots = torch.randperm(len(self.samples), generator=generator)[: size * count]
        restarted = torch.rand(len(slots), generator=generator) < restart_prob
        shape = (int(restarted.sum()), *self.samples.shape[1:])
        low, high = self.value_range
        noise = low + (high - low) * torch.rand(shape, generator=generator)
        mine = slice(rank * count, (rank + 1) * count)
        before = int(restarted[: mine.start].sum())
        device = self.samples.device
        fresh, slots = restarted[mine], slots.to(device)
        images = self.samples[slots[mine]].float()
        fresh = fresh.to(device)
        images[fresh] = noise[before : before + int(fresh.sum())].to(device)
        restarted = restarted.to(device)
        return ChainStarts(images, fresh, slots, restarted, self.num_steps[slots] * ~restarted)

    @torch.no_grad()
    def put(self, starts: ChainStarts, samples: Tensor, *, num_steps: int) -> None:
        """Store this rank's samples, ``(N, 3, S, S)``, after ``num_steps`` more steps."""
        self.samples[starts.slots] = gather_batch_no_grad(samples.to(self.samples.dtype))
        self.num_steps[starts.slots] = starts.num_steps + num_steps
