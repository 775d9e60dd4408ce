"""The configuration of a run, composed of sections of other modules, and its derived values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from raysl.config.base import Config
from raysl.config.idle import dotted_keys, idle_settings, without_idle
from raysl.config.load import (
    Problem,
    apply_overrides,
    bad_keys,
    get_key,
    merge,
    parse_override,
    read_layers,
    validated,
)
from raysl.config.shipped import find_config
from raysl.data.fragments import images_per_epoch
from raysl.data.plan import Plan, item_size_for
from raysl.data.stream import BlockSpec
from raysl.errors import ConfigError, listed
from raysl.evaluate.old_keys import new_keys, rename_old_keys, resolve_final
from raysl.evaluate.protocol import EvaluateConfig
from raysl.methods import load_method
from raysl.methods.base import MethodConfig, RunShape, SizeDefault, TrainingSet
from raysl.nn.backbones import BackboneConfig
from raysl.nn.depth import check_layer_decay
from raysl.optim.build import OptimConfig, peak_lr
from raysl.run.cluster_config import ClusterConfig
from raysl.sources.source import DataConfig, Source
from raysl.track.config import OutputDir, TrackConfig, check_run_name
from raysl.track.results import TRAINING
from raysl.train.health import HealthConfig
from raysl.train.loop import TrainConfig
from raysl.train.sizes import check_sizes

M = TypeVar("M", bound=MethodConfig)


class RunConfig(Config, Generic[M]):
    """One pretraining run."""

    name: str
    """The run folder is output_dir/name; the same name resumes the same run."""
    output_dir: OutputDir = "runs"
    """Parent of the run folder: a path, or an address of a store such as s3://BUCKET/FOLDER."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, order and views."""
    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    method: M
    optim: OptimConfig = OptimConfig()
    adversary_optim: OptimConfig | None = None
    """The optimizer of a method's adversary (context encoder); null uses the settings of optim."""
    train: TrainConfig
    health: HealthConfig = HealthConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        return check_run_name(name)

    @classmethod
    def idle_by(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the settings without effect for this method or optimizer, with the reason."""
        for name in ("layer_decay", "max_grad_norm"):
            yield f"adversary_optim.{name}", "for an adversary, which is no encoder and not clipped"
        kind: Any = cls.model_fields["method"].annotation
        method = validated(kind, values.get("method") or {})
        if isinstance(method, list | _UnknownMethod):
            return
        if not method.has_adversary:
            yield "adversary_optim", f"with method {method.name} as it is set, without an adversary"
        if method.classifies:  # a student's data.labels are those that its teacher saw
            reason = f"with method {method.name}, which trains on labels itself"
            final = get_key(values, "evaluate.final")
            trains = isinstance(final, list) and any(name in final for name in TRAINING)
            yield from ((f"evaluate.{key}", reason) for key in (*TRAINING, *["final"] * trains))
        elif not method.uses_labels and get_key(values, "data.labels.only") is not True:
            for name in ("fraction", "seed"):
                yield f"data.labels.{name}", f"with method {method.name}, which sees no labels"

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig[M]":
        misfits = list(self._misfits())
        if misfits:
            raise ValueError("\n".join(misfits))
        return self

    def _misfits(self) -> Iterator[str]:
        """Yield a message for each invalid combination of settings."""
        if (self.train.epochs is None) == (self.train.steps is None):
            yield "give exactly one of train.epochs and train.steps"
        yield from self._worker_misfits()
        checks: list[Callable[[], None]] = [
            lambda: self.backbone.check_view_sizes(self.view_sizes_px),
            lambda: self.evaluate.check_head_layers(self.method, is_vit=self.backbone.is_vit),
            lambda: check_layer_decay(self.backbone, self.optim.layer_decay),
            self._check_online,
        ]
        yield from _messages(checks)

    def _worker_misfits(self) -> Iterator[str]:
        """Yield why the fewest train workers that the run may have cannot train it."""
        counts, problems = self.cluster.counts, self._count_misfits(self.cluster.counts[0])
        if not (problems and self.cluster.is_elastic):
            yield from problems
            return
        usable = self.worker_counts
        use = f"can, so set min to {usable[0]}" if usable else "can"
        yield (
            f"cluster.num_train_workers={self.cluster.num_train_workers}: {counts[0]} cannot train "
            f"this run: {'; '.join(problems)}. Of {counts[0]} to {counts[-1]} train workers, "
            f"{listed(usable) or 'none'} {use}"
        )

    def _count_misfits(self, num_workers: int) -> list[str]:
        """Return why so many train workers cannot train this run."""
        method = None if isinstance(self.method, _UnknownMethod) else self.method
        shape = RunShape(
            global_batch_size=self.train.global_batch_size,
            num_workers=num_workers,
            view_sizes_px=self.view_sizes_px,
            backbone=self.backbone,
        )
        return _messages(
            [
                lambda: check_sizes(self.train, self.backbone, method, num_workers=num_workers),
                lambda: self.method.check_shape(shape),
            ]
        )

    @property
    def worker_counts(self) -> tuple[int, ...]:
        """Numbers of train workers that the run may have, ascending: those that share its batch."""
        return tuple(n for n in self.cluster.counts if not self._count_misfits(n))

    def _check_online(self) -> None:
        if self.evaluate.online == "background" and not self.cluster.uses_ray:
            raise ConfigError(
                "evaluate.online=background needs Ray, which cluster.num_train_workers=0 does "
                "not use; set evaluate.online=auto or cluster.num_train_workers=1"
            )

    @property
    def view_sizes_px(self) -> tuple[int, ...]:
        """Side in px of each view of an image, in the order of ``Batch.views``."""
        return tuple(v.size_px for v in self.data.views.views() for _ in range(v.count))

    @property
    def image_size_px(self) -> int:
        """Side in px of the largest view, and of the images when the encoder is evaluated."""
        return max(self.view_sizes_px)


def _messages(checks: Sequence[Callable[[], None]]) -> list[str]:
    """Return the messages of the checks that fail."""
    messages = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            messages.append(str(error))
    return messages


class Derived(NamedTuple):
    """Values that follow from a configuration and the number of training images.

    Sizes of a worker's part are those with the fewest train workers that the run may have.
    """

    num_images: int
    steps_per_epoch: int
    total_steps: int
    batch_size_per_worker: int
    item_size: int
    peak_lr: float
    warmup_steps: int
    checkpoint_every_steps: int
    evaluate_every_steps: int | None
    views_per_image: int


def derive_for(config: RunConfig[Any], source: Source) -> Derived:
    """Return the derived values for a source; a mixed source counts images by their weights."""
    return derive(config, num_images=images_per_epoch(source.group_sizes, source.weights))


def derive(config: RunConfig[Any], *, num_images: int) -> Derived:
    """Return the derived values.

    Args:
        config: The run's configuration.
        num_images: Number of images per epoch.

    Raises:
        ConfigError: If the batch is larger than the source or the run has no step.
    """
    train = config.train
    batch = train.global_batch_size
    if batch > num_images:
        raise ConfigError(
            f"train.global_batch_size={batch} is larger than data.source={config.data.source}, "
            f"which has {num_images:,} images; use at most {num_images}"
        )
    per_epoch = num_images // batch
    total = train.steps if train.steps is not None else round((train.epochs or 0.0) * per_epoch)
    if total < 1:
        raise ConfigError(f"train.epochs={train.epochs} is less than one step of {batch} images")
    views = config.data.views.views()
    per_worker = batch // config.cluster.counts[0]
    every = config.evaluate.every
    sizes = {"steps_per_epoch": per_epoch, "total_steps": total}
    return Derived(
        num_images=num_images,
        steps_per_epoch=per_epoch,
        total_steps=total,
        batch_size_per_worker=per_worker,
        item_size=item_size_for(
            per_worker, bytes_per_image=block_spec(config.data).bytes_per_image
        ),
        peak_lr=peak_lr(config.optim, global_batch_size=batch),
        warmup_steps=config.optim.warmup.in_steps(**sizes),
        checkpoint_every_steps=max(1, train.checkpoint_every.in_steps(**sizes)),
        evaluate_every_steps=None if every is None else max(1, every.in_steps(**sizes)),
        views_per_image=sum(view.count for view in views),
    )


def derived_facts(config: RunConfig[Any], derived: Derived) -> dict[str, Any]:
    """Return the derived values; sizes of a worker's part by number of workers, if that varies."""
    facts: dict[str, Any] = derived._asdict()
    if config.cluster.is_elastic:
        sizes = {str(n): config.train.global_batch_size // n for n in config.worker_counts}
        image = block_spec(config.data).bytes_per_image
        facts["batch_size_per_worker"] = sizes
        facts["item_size"] = {
            n: item_size_for(size, bytes_per_image=image) for n, size in sizes.items()
        }
    return facts


def training_set(config: RunConfig[Any], source: Source) -> TrainingSet:
    """Return the facts about the training images that a method is built with."""
    labels = source.labels() if config.method.uses_labels else None
    class_ids = None if labels is None else labels[labels >= 0]
    return TrainingSet(
        num_images=int(source.group_sizes.sum()),
        global_batch_size=config.train.global_batch_size,
        view_sizes_px=config.view_sizes_px,
        class_counts=None
        if class_ids is None or not len(class_ids)
        else tuple(np.bincount(class_ids, minlength=len(source.class_names)).tolist()),
        class_names=() if class_ids is None else tuple(source.class_names),
        mean=config.data.mean,
        std=config.data.std,
    )


def size_defaults(config: RunConfig[Any], source: Source) -> dict[str, SizeDefault]:
    """Return the defaults of the method that depend on the size of the data set, by key."""
    defaults = config.method.size_defaults(training_set(config, source))
    return {f"method.{name}": default for name, default in defaults.items()}


def plan_of(config: RunConfig[Any], source: Source) -> Plan:
    """Return the order in which a run reads a source."""
    derived = derive_for(config, source)
    return Plan(
        source.group_sizes,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        item_size=derived.item_size,
        num_steps=derived.total_steps,
        window_size=source.window_size,
        weights=source.weights,
    )


def block_spec(data: DataConfig) -> BlockSpec:
    """Return the specification of a run's blocks of views."""
    return BlockSpec(data.views.views(), color_on=data.color_on, bad_images=data.bad_images)


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig[Any]:
    """Read a run from a YAML file or the name of a shipped one; ``name`` defaults to the file's.

    Raises:
        ConfigError: Lists every bad key at once, and every setting without effect.
    """
    values = read_run_values(find_config(path))
    keys = [parse_override(override)[0] for override in overrides]
    values = drop_idle(values, apply_overrides(values, overrides), keys)
    values.setdefault("name", path.stem)
    return run_from_user(values, where=" ".join([str(path), *overrides]))


def read_run_values(path: Path) -> dict[str, Any]:
    """Read the plain values of a run; a file drops inherited settings without effect.

    Raises:
        ConfigError: If a file is missing or not a YAML mapping.
    """
    values: dict[str, Any] = {}
    for layer in read_layers(path):
        values = drop_idle(values, merge(values, layer), list(dotted_keys(layer)))
    return values


def drop_idle(
    before: Mapping[str, Any], after: Mapping[str, Any], given: Sequence[str]
) -> dict[str, Any]:
    """Return ``after`` without settings of lower layers that have no effect under the top layer.

    Args:
        before: Plain values of the lower layers.
        after: The same values with the top layer applied.
        given: Dotted keys that the top layer sets.
    """
    before, after = rename_old_keys(before), rename_old_keys(after, given)
    given = [key for each in given for key in new_keys(each)]
    return without_idle(_model_for(after)[0], before, after, given)


def idle_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return the settings of a run that have no effect."""
    return list(idle_settings(_model_for(values)[0], values))


def run_from_user(values: Mapping[str, Any], *, where: str) -> RunConfig[Any]:
    """Validate plain values of a user as a run; every setting must have an effect.

    Raises:
        ConfigError: Lists every bad key at once, and every setting without effect.
    """
    run, idle = run_or_problems(values), idle_problems(values)
    if isinstance(run, list) or idle:
        raise bad_keys([*(run if isinstance(run, list) else []), *idle], where=where)
    return run


def run_from_values(values: Mapping[str, Any], *, where: str) -> RunConfig[Any]:
    """Validate plain values as a run; ``where`` names their origin in messages.

    Raises:
        ConfigError: Lists every bad key at once.
    """
    run = run_or_problems(values)
    if isinstance(run, list):
        raise bad_keys(run, where=where)
    return run


def run_or_problems(values: Mapping[str, Any]) -> RunConfig[Any] | list[Problem]:
    """Return the validated run, or a list of all problems in the values."""
    values = resolve_final(values)
    model, problem = _model_for(values)
    if problem is None:
        return validated(model, values)
    run = validated(model, dict(values) | {"method": {"name": ""}})
    return [problem, *(run if isinstance(run, list) else [])]


def _model_for(values: Mapping[str, Any]) -> tuple[type[RunConfig[Any]], Problem | None]:
    """Return the pydantic model of a run, and a problem if its method is unknown."""
    section = values.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    text = "method.name: missing; give method: {name: simclr} or another"
    if name is not None:
        try:
            config_type = load_method(str(name)).Config
            return RunConfig[config_type], None  # type: ignore[valid-type]
        except ConfigError as error:
            text = str(error)
    return RunConfig[_UnknownMethod], Problem(("method", "name"), text)


class _UnknownMethod(MethodConfig):
    """Replaces an unknown method, so that the rest of the run is checked too."""

    takes_more_views = True

    @property
    def num_views(self) -> int:
        return 0

    def projection_head_layers(self, *, is_vit: bool) -> int:
        return 99
