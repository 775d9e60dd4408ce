"""Build the optimizers of a run, with learning rate and weight decay as functions of the step."""

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from raysl.config.base import (
    Config,
    Duration,
    Idle,
    NonNegativeFloat,
    PositiveFloat,
    Probability,
)
from raysl.nn.schedules import cosine, warmup_cosine
from raysl.optim.lars import LARS

LR_REFERENCE_BATCH = 256  # global batch that ``base_lr`` is for


class OptimConfig(Config):
    """The settings of the optimizer and its schedules."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("sgd_momentum",), {"name": ("adamw",)}),
        Idle(("nesterov",), {"name": ("adamw", "lars")}),
        Idle(("adam_betas",), {"name": ("sgd", "lars")}),
        Idle(("trust_coefficient",), {"name": ("sgd", "adamw")}),
        Idle(("final_lr_ratio",), {"schedule": ("constant",)}),
        Idle(
            ("decay_bias_and_norm",),
            {
                "name": ("sgd", "adamw"),  # because LARS also adapts their rates
                "weight_decay": (0,),
                "final_weight_decay": (None, 0),
            },
        ),
    )
    name: Literal["sgd", "adamw", "lars"] = "sgd"
    base_lr: PositiveFloat = 0.03
    """Learning rate for a global batch of 256 images (arXiv:1706.02677v2, sec. 2.1)."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """Scaling of the learning rate with the global batch B: B / 256, sqrt(B / 256), or none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule after the warm-up."""
    warmup: Duration = Duration(epochs=0.0)
    """Linear rise to the peak learning rate."""
    final_lr_ratio: Probability = 0.0
    """Ratio of the learning rate at the end to the peak, for the cosine schedule."""
    weight_decay: NonNegativeFloat = 1e-4
    """Coefficient of weight decay at the start, or throughout."""
    final_weight_decay: NonNegativeFloat | None = None
    """Weight decay at the end of the run, approached along half a cosine; null keeps it constant
    (DINO goes from 0.04 to 0.4)."""
    decay_bias_and_norm: bool = False
    """Also decay biases and batch norm (MoCo's and many SGD recipes do; LARS recipes do not)."""
    bias_and_norm_lr_ratio: PositiveFloat = 1.0
    """Learning rate of biases and norms over that of weights. Barlow Twins' authors use 0.0048 and
    0.2 (their --learning-rate-biases and --learning-rate-weights)."""
    sgd_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD and LARS."""
    nesterov: bool = False
    """Nesterov momentum, for SGD."""
    adam_betas: tuple[
        Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]
    ] = (0.9, 0.999)
    """Betas of AdamW."""
    trust_coefficient: PositiveFloat = 0.001
    """LARS: eta, the factor of each layer's adapted rate."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of an encoder's layer over that of the layer above it: blocks of a ViT (MAE
    fine-tunes ViT-Base with 0.65), stages of a ResNet. 1 treats all alike."""
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


def weight_decay_at(config: OptimConfig, step: int, *, total_steps: int) -> float:
    """Return the weight decay of the optimizer step about to be taken, counted from 0."""
    if config.final_weight_decay is None:
        return config.weight_decay
    return cosine(step, total_steps, start=config.weight_decay, end=config.final_weight_decay)


class Special(NamedTuple):
    """The parameters that an optimizer treats differently from the others."""

    constant_lr: AbstractSet[nn.Parameter] = frozenset()
    """Parameters whose learning rate stays at the peak."""
    unadapted: AbstractSet[nn.Parameter] = frozenset()
    """Parameters that LARS treats like biases."""
    lr_scales: Mapping[nn.Parameter, float] = MappingProxyType({})
    """Factors on the learning rate, where not 1."""


NOTHING_SPECIAL = Special()


def param_groups(
    parameters: Iterable[nn.Parameter], config: OptimConfig, *, special: Special = NOTHING_SPECIAL
) -> list[dict[str, Any]]:
    """Return torch's groups of the trainable parameters: weights, and biases and norms (vectors).

    Args:
        parameters: The parameters of this optimizer; those without gradient are left out.
        config: The optimizer's settings.
        special: Parameters with a special treatment, which get groups of their own.
    """
    is_lars = config.name == "lars"
    members: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or (is_lars and parameter in special.unadapted)
            scale = special.lr_scales.get(parameter, 1.0)
            if parameter.ndim <= 1:
                scale *= config.bias_and_norm_lr_ratio
            key = (parameter in special.constant_lr, plain, scale)
            members.setdefault(key, []).append(parameter)
    groups = []
    for constant, plain, scale in sorted(members):
        decays = not plain or config.decay_bias_and_norm
        group: dict[str, Any] = {
            "params": members[constant, plain, scale],
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
            "constant_lr": constant,
            "lr_scale": scale,
        }
        if is_lars and plain:
            group["adapt"] = config.decay_bias_and_norm
        groups.append(group)
    return groups


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, *, special: Special = NOTHING_SPECIAL
) -> Optimizer:
    """Build a torch optimizer; :class:`ScheduledOptimizer` sets its rates at every step."""
    groups = param_groups(parameters, config, special=special)
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


class Rates(NamedTuple):
    """The rates of one optimizer step."""

    lr: float
    peak_lr: float  # for groups with a constant learning rate
    weight_decay: float


class ScheduledOptimizer:
    """An optimizer with its rates as a function of the step.

    Args:
        optimizer: Its groups may have ``constant_lr``, ``lr_scale`` and ``decays``, as set by
            :func:`param_groups`.
        rates: Maps a step, counted from 0, to the rates of that step.
    """

    def __init__(self, optimizer: Optimizer, rates: Callable[[int], Rates]) -> None:
        self.optimizer = optimizer
        self.rates = rates

    def prepare(self, step: int) -> None:
        """Set the rates of a step and clear the previous gradients."""
        rates = self.rates(step)
        for group in self.optimizer.param_groups:
            lr = rates.peak_lr if group.get("constant_lr") else rates.lr
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if group.get("decays"):
                group["weight_decay"] = rates.weight_decay
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that it updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def scheduled_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    *,
    global_batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
    special: Special = NOTHING_SPECIAL,
) -> ScheduledOptimizer:
    """Build an optimizer with the schedules of its configuration."""
    peak = peak_lr(config, global_batch_size=global_batch_size)

    def rates(step: int) -> Rates:
        return Rates(
            lr_at(
                config, step, peak=peak, steps_per_epoch=steps_per_epoch, total_steps=total_steps
            ),
            peak,
            weight_decay_at(config, step, total_steps=total_steps),
        )

    return ScheduledOptimizer(build_optimizer(parameters, config, special=special), rates)
