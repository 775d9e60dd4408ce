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
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode in the block: each output depends on one image only."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def energy_gradient(energy: Energy, images: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of each image's energy with respect to its pixels, ``(N, 3, S, S)``.

    No parameter's ``grad`` changes, and data-parallel training is not triggered.

    Args:
        energy: Computes each image's energy.
        images: The images at which to evaluate the gradient, ``(N, 3, S, S)``; not changed.
        create_graph: Whether the gradient will itself be differentiated.
    """
    with torch.enable_grad():
        points = images.detach().requires_grad_()
        gradient = torch.autograd.grad(energy(points).sum(), points, create_graph=create_graph)
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
        energy: Computes each image's energy.
        images: The starts of the chains, ``(N, 3, S, S)``; not changed.
        num_steps: Number of steps, >= 0.
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
    gradient_norms = images.new_zeros(len(images))
    for _ in range(num_steps):
        gradient = energy_gradient(energy, images)
        gradient_norms = gradient.flatten(1).norm(dim=1)
        images = images - step_size * gradient.clamp(-max_gradient, max_gradient)
        if noise_std > 0:
            images = images + noise_std * torch.randn_like(images)
        images = images.clamp(*value_range)
    return images, gradient_norms


class ChainStarts(NamedTuple):
    """The starting points of a step's chains."""

    images: Tensor  # (N, 3, S, S): of this rank
    fresh: Tensor  # (N,) bool: whether a chain of this rank starts from noise
    slots: Tensor  # (R * N,) int64: buffer rows for all ranks' samples
    restarted: Tensor  # (R * N,) bool: whether a chain of any rank starts from noise
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
            count: N, number of chains of each rank; R * N is at most the length of the buffer.
            restart_prob: Probability that a chain restarts from noise.
            generator: A CPU generator in the same state on every rank.
        """
        rank, size = rank_and_size()
        slots = torch.randperm(len(self.samples), generator=generator)[: size * count]
        restarted = torch.rand(len(slots), generator=generator) < restart_prob
        shape = (int(restarted.sum()), *self.samples.shape[1:])
        low, high = self.value_range
        noise = low + (high - low) * torch.rand(shape, generator=generator)
        mine = slice(rank * count, (rank + 1) * count)
        first_noise = int(restarted[: mine.start].sum())
        device = self.samples.device
        fresh, slots = restarted[mine], slots.to(device)
        images = self.samples[slots[mine]].float()
        fresh = fresh.to(device)
        images[fresh] = noise[first_noise : first_noise + int(fresh.sum())].to(device)
        restarted = restarted.to(device)
        return ChainStarts(images, fresh, slots, restarted, self.num_steps[slots] * ~restarted)

    @torch.no_grad()
    def put(self, starts: ChainStarts, samples: Tensor, *, num_steps: int) -> None:
        """Store this rank's samples, ``(N, 3, S, S)``, after ``num_steps`` more steps."""
        self.samples[starts.slots] = gather_batch_no_grad(samples.to(self.samples.dtype))
        self.num_steps[starts.slots] = starts.num_steps + num_steps
