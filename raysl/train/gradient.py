"""Compute a batch's gradient: at once, accumulated over micro-batches, or cached (GradCache).

L. Gao, Y. Zhang, J. Han, J. Callan: "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", 2021, arXiv:2101.06983v2 (gradient caching).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from raysl.errors import ConfigError
from raysl.methods.base import Batch, EmbeddingMethod, LossOutput, Method, Progress
from raysl.nn.batchnorm import untracked_statistics
from raysl.nn.collectives import average_gradients

Autocast = Callable[[], AbstractContextManager[Any]]
"""Opens the context of a forward pass, which may use a lower precision."""


def can_split(method: type[Method]) -> bool:
    """Return whether a method's batch may be split into micro-batches."""
    return issubclass(method, EmbeddingMethod) or method.loss_is_mean_over_images


def backward(
    method: Method,
    batch: Batch,
    progress: Progress,
    *,
    model: nn.Module,
    autocast: Autocast,
    micro_batch_size: int | None = None,
) -> LossOutput:
    """Compute the gradient of a batch's loss, averaged over ranks, into the parameters.

    Args:
        method: The method.
        batch: All images of this rank in the step.
        progress: The state of training at this step.
        model: The method, or its data-parallel wrapper; called for a whole batch.
        autocast: Opens the context of a forward pass.
        micro_batch_size: Images of one forward pass; None, or at least the batch size, takes all.

    Returns:
        The output for the whole batch, detached.

    Raises:
        ConfigError: If the method's batch cannot be split.
    """
    if micro_batch_size is None:
        with autocast():
            output: LossOutput = model(batch, progress)
        _total_loss(output).backward()  # type: ignore[no-untyped-call]
        return _detach(output)
    parts = _split(batch, micro_batch_size)
    # The data-parallel wrapper averages at the end of every backward pass; average once instead.
    if isinstance(method, EmbeddingMethod):
        output = _backward_cached(method, batch, parts, progress, autocast)
    elif method.loss_is_mean_over_images:
        output = _backward_accumulated(method, parts, progress, autocast)
    else:
        raise ConfigError(
            f"train.micro_batch_size={micro_batch_size}: the loss of {type(method).__name__} can "
            f"neither be cached nor accumulated; set it to null"
        )
    average_gradients(method.parameters())
    return output


def _backward_cached(
    method: EmbeddingMethod,
    batch: Batch,
    parts: Sequence[Batch],
    progress: Progress,
    autocast: Autocast,
) -> LossOutput:
    """Embed all parts, differentiate the loss by the embeddings, then embed again with gradients.

    The second pass must equal the first: the random state is restored, and running statistics are
    only updated in the second pass.
    """
    device = parts[0].index.device
    states: list[_RandomState] = []
    embedded: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), untracked_statistics(method):
        for part in parts:
            states.append(_RandomState(device))
            with autocast():
                embedded.append(method.embeddings(part, progress))
    whole = tuple(torch.cat(same).requires_grad_() for same in zip(*embedded, strict=True))
    with autocast():
        output = method.loss_of((whole[0].detach(), *whole[1:]), batch, progress)
    _total_loss(output).backward()  # type: ignore[no-untyped-call]
    sizes = [len(part.index) for part in parts]
    gradients = [None if w.grad is None else w.grad.split(sizes) for w in whole]
    after_loss = _RandomState(device)
    for number, part in enumerate(parts):
        states[number].restore()
        with autocast():
            recomputed = method.embeddings(part, progress)
        outputs, output_gradients = [], []
        for tensor, gradient in zip(recomputed, gradients, strict=True):
            if tensor.requires_grad and gradient is not None:
                outputs.append(tensor)
                output_gradients.append(gradient[number])
        torch.autograd.backward(outputs, output_gradients)
    after_loss.restore()
    return _detach(output)


def _backward_accumulated(
    method: Method, parts: Sequence[Batch], progress: Progress, autocast: Autocast
) -> LossOutput:
    """Add up the gradients of the parts, weighted by their share of the images.

    Returns:
        The output for the whole batch: weighted means of losses and metrics, and all features.
    """
    total = sum(len(part.index) for part in parts)
    shares, outputs = [], []
    for part in parts:
        share = len(part.index) / total
        with autocast():
            output = method(part, progress)
        (_total_loss(output) * share).backward()
        shares.append(share)
        outputs.append(_detach(output))

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([v * s for v, s in zip(values, shares, strict=True)]).sum(0)

    adversary = [o.adversary_loss for o in outputs if o.adversary_loss is not None]
    return LossOutput(
        mean([o.loss for o in outputs]),
        torch.cat([o.features for o in outputs]),
        {name: mean([o.metrics[name] for o in outputs]) for name in outputs[0].metrics},
        mean(adversary) if adversary else None,
    )


class _RandomState:
    """The state of torch's global random generators, of the CPU and of the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def _split(batch: Batch, size: int) -> list[Batch]:
    views = [view.split(size) for view in batch.views]
    index = batch.index.split(size)
    labels = [None] * len(index) if batch.labels is None else batch.labels.split(size)
    return [
        Batch([view[i] for view in views], rows, part_labels)
        for i, (rows, part_labels) in enumerate(zip(index, labels, strict=True))
    ]


def _total_loss(output: LossOutput) -> Tensor:
    """Return the sum of both losses: neither has a gradient in the other's parameters."""
    if output.adversary_loss is None:
        return output.loss
    return output.loss + output.adversary_loss


def _detach(output: LossOutput) -> LossOutput:
    adversary = output.adversary_loss
    return output._replace(
        loss=output.loss.detach(), adversary_loss=None if adversary is None else adversary.detach()
    )
