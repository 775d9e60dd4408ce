"""The optimizer of a run, and its learning rate as a function of the step."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from raysl.config.base import (
    Config,
    Duration,
    NonNegativeFloat,
    PositiveFloat,
    Probability,
)
from raysl.nn.schedules import warmup_cosine
from raysl.optim.lars import LARS

LR_REFERENCE_BATCH = 256


class OptimConfig(Config):
    """How weights are updated."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    base_lr: PositiveFloat = 0.03
    """Learning rate for a global batch of 256 images (arXiv:1706.02677v2, sec. 2.1)."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How it grows with the global batch B: by B / 256, by sqrt(B / 256), or not."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""
    warmup: Duration = Duration(epochs=0.0)
    """Linear rise to the peak learning rate."""
    final_lr_ratio: Probability = 0.0
    """Learning rate at the end over the peak, for the cosine."""
    weight_decay: NonNegativeFloat = 1e-4
    decay_bias_and_norm: bool = False
    """Also decay biases and batch norm (MoCo's and many SGD recipes do; LARS recipes do not)."""
    sgd_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD and LARS."""
    nesterov: bool = False
    adam_betas: tuple[
        Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]
    ] = (0.9, 0.999)
    trust_coefficient: PositiveFloat = 0.001
    """LARS: eta."""
    max_grad_norm: PositiveFloat | None = None
    """Clip the gradient to this norm; null never clips."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "OptimConfig":
        if self.nesterov and self.sgd_momentum == 0.0:
            raise ValueError("nesterov needs sgd_momentum above 0, such as 0.9; got 0")
        return self


def peak_lr(config: OptimConfig, *, global_batch_size: int) -> float:
    """Return the learning rate at the end of the warm-up."""
    ratio = global_batch_size / LR_REFERENCE_BATCH
    scale = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.lr_scaling]
    return config.base_lr * scale


def lr_at(
    config: OptimConfig, step: int, *, peak: float, steps_per_epoch: int, total_steps: int
) -> float:
    """Return the learning rate of the optimizer step about to be taken, counted from 0."""
    warmup = config.warmup.in_steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    final = peak if config.schedule == "constant" else peak * config.final_lr_ratio
    return warmup_cosine(step, peak=peak, final=final, warmup_steps=warmup, total_steps=total_steps)


def param_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split trainable parameters into weights, and biases and norms (all that are vectors)."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    weights = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    decay = config.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": decay},
        {"params": vectors, "weight_decay": decay if config.decay_bias_and_norm else 0.0},
    ]
    if config.name == "lars":
        groups[1]["adapt"] = config.decay_bias_and_norm
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer; the loop sets the learning rate of every step."""
    groups = param_groups(module, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.adam_betas)
    if config.name == "lars":
        return LARS(
            groups,
            config.base_lr,
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
            trust_coefficient=config.trust_coefficient,
        )
    return torch.optim.SGD(
        groups, lr=config.base_lr, momentum=config.sgd_momentum, nesterov=config.nesterov
    )
