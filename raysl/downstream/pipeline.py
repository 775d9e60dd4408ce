"""Expand a pipeline's configuration into its steps: pretrain, fine-tune, distil (SimCLR v2).

T. Chen, S. Kornblith, K. Swersky, M. Norouzi, G. Hinton: "Big Self-Supervised Models are Strong
Semi-Supervised Learners", 2020, arXiv:2006.10029v2, fig. 3.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from raysl.config.base import Config
from raysl.config.load import (
    apply_overrides,
    parse_override,
    plain_copy,
    read_mapping,
    set_key,
    validate,
)
from raysl.config.shipped import find_config
from raysl.errors import ConfigError
from raysl.run.from_run import RunOrigin, distill_from, finetune_from, origin_of
from raysl.run.recipe import RunConfig, drop_idle, read_run_values, run_from_user
from raysl.sources.source import Source
from raysl.track.config import TrackConfig, check_run_name
from raysl.track.run_folder import RunFolder

Kind = Literal["pretrain", "finetune", "linear", "scratch", "distill"]
_Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
_PRETRAIN = "pretrain"


class FinetuneStep(Config):
    """Runs that learn from labels: one for each share of the labels and each layer."""

    labels: Annotated[tuple[_Fraction, ...], Field(min_length=1)] = (0.01, 0.1)
    """Shares of the labels, class-balanced; a smaller one lies within a larger one."""
    start: Literal["pretrained", "random"] = "pretrained"
    """What they begin with: the pretrained encoder, or random weights, for comparison."""
    head_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1,)
    """Layers of the projection head to keep; 0 keeps the encoder alone."""
    freeze_encoder: bool = False
    """Leave the encoder as it is: with head_layers [0], linear evaluation."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of these runs, such as train.epochs."""


class Student(Config):
    """Runs that distil: one for each share of the labels that a teacher was fine-tuned on."""

    name: str
    """Of the student; its runs are distill-PERCENT-NAME."""
    labels: tuple[_Fraction, ...] | None = None
    """Shares of the labels of its teachers; null: every one that has a teacher."""
    teacher: Annotated[int, Field(ge=0)] | str = 1
    """Who teaches: the fine-tuned run with so many layers of the head kept; best, that with the
    highest accuracy on the test images, which makes the accuracy of the student slightly too good
    to be true; or an earlier student by name (the paper distils into the same size first, then
    into a smaller one)."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of these runs, such as backbone.width."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        return check_run_name(name)


class PipelineConfig(Config):
    """A pretraining, and what follows from it."""

    name: str
    """The folder is output_dir/name, each run a folder in it; the same name goes on with it."""
    output_dir: str = "runs"
    """Parent of the pipeline's folder, which is called ``name``."""
    base: str
    """The YAML file of the pretraining, relative to this one."""
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of the pretraining, on top of base."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of every run; those of a step win over them."""
    finetune: Annotated[tuple[FinetuneStep, ...], Field(min_length=1)] = (FinetuneStep(),)
    """What is fine-tuned."""
    distill: tuple[Student, ...] = ()
    """What is distilled."""
    track: TrackConfig = TrackConfig()
    """MLflow gets one run for the pipeline and below it one for each step."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        return check_run_name(name)


class Step(NamedTuple):
    """One run of a pipeline."""

    name: str
    kind: Kind
    labels: float | None
    """Share of the labels that it sees, or its teacher saw; None for pretraining."""
    head_layers: int | None
    """Of the projection head that stay; None where there is no choice."""
    teachers: tuple[str, ...]
    """Names of the steps, one of which teaches it: the best one, where there are several."""
    overrides: tuple[str, ...]
    """Of what follows from the step before."""


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline; its name defaults to the file's, and its base file is found.

    An override whose first part is a field of the pipeline changes the pipeline, such as
    ``pretrain.train.epochs=5``; one of a run, such as ``data.source=FOLDER``, is for every run.

    Raises:
        ConfigError: Lists every bad key at once.
    """
    where = " ".join([str(path), *overrides])
    path = find_config(path, kind="pipelines")
    values = read_mapping(path)
    values.setdefault("name", path.stem)
    for text in overrides:
        _override(values, text)
    if isinstance(values.get("base"), str):
        values["base"] = str(find_config(values["base"], beside=path.parent).absolute())
    return validate(PipelineConfig, values, where=where)


def _override(values: dict[str, Any], text: str) -> None:
    key, value = parse_override(text)
    first, _, rest = key.partition(".")
    if first in ("pretrain", "set") and rest:
        values.setdefault(first, {})[rest] = value
    elif first in PipelineConfig.model_fields:
        set_key(values, key, value)
    elif first in RunConfig.model_fields:
        values.setdefault("set", {})[key] = value
    else:
        known = sorted({*PipelineConfig.model_fields, *RunConfig.model_fields})
        near = difflib.get_close_matches(first, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(
            f"override {text!r}: {first!r} is neither of a pipeline nor of a run; {hint}"
        )


def plan_steps(config: PipelineConfig) -> list[Step]:
    """Return the runs of a pipeline in order; each needs only earlier ones.

    Raises:
        ConfigError: If two have one name, or a student has no teacher.
    """
    steps = [Step(_PRETRAIN, "pretrain", None, None, (), _as_overrides(config.pretrain))]
    for block in config.finetune:
        steps += list(_finetune_steps(block))
    for student in config.distill:
        steps += list(_distill_steps(student, steps))
    names = [step.name for step in steps]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"finetune and distill: the steps {', '.join(twice)} stand there twice; ask for each "
            f"share of labels and layer once, and give students different names"
        )
    return steps


def _finetune_steps(block: FinetuneStep) -> Iterator[Step]:
    """Yield the runs of a block, by share of the labels."""
    scratch = block.start == "random"
    kind: Kind = "scratch" if scratch else "linear" if block.freeze_encoder else "finetune"
    for share in block.labels:
        for layers in (0,) if scratch else block.head_layers:
            fixed: dict[str, Any] = {
                "data.labels": {"fraction": share, "seed": 0, "only": True},
                "method.head_layers": layers,
                "method.freeze_encoder": block.freeze_encoder,
            }
            if scratch:
                fixed |= {"backbone.weights": None, "method.head": None}
            name = f"{kind}-{_percent(share)}" + ("" if scratch else f"-layer{layers}")
            overrides = _as_overrides(fixed | block.set)
            yield Step(name, kind, share, None if scratch else layers, (), overrides)


def _distill_steps(student: Student, steps: Sequence[Step]) -> Iterator[Step]:
    """Yield the runs of a student, one for each share of the labels that has a teacher."""
    tuned = [step for step in steps if step.kind == "finetune"]
    shares = student.labels or tuple(dict.fromkeys(step.labels for step in tuned if step.labels))
    found = 0
    for share in shares:
        if isinstance(student.teacher, int):
            layer = student.teacher
            of = [s.name for s in tuned if s.labels == share and s.head_layers == layer]
        elif student.teacher == "best":
            of = [s.name for s in tuned if s.labels == share]
        else:
            of = [s.name for s in steps if s.name == f"distill-{_percent(share)}-{student.teacher}"]
        if not of and student.labels is not None:
            raise _no_teacher(student, share, steps)
        if of:
            found += 1
            name = f"distill-{_percent(share)}-{student.name}"
            yield Step(name, "distill", share, None, tuple(of), _as_overrides(student.set))
    if not found:
        raise _no_teacher(student, None, steps)


def _no_teacher(student: Student, share: float | None, steps: Sequence[Step]) -> ConfigError:
    known = ", ".join(step.name for step in steps if step.kind in ("finetune", "distill"))
    among = "" if share is None else f" with {100 * share:g} % of the labels"
    return ConfigError(
        f"distill: the student {student.name!r} has teacher={student.teacher!r}, and there is no "
        f"such run{among}; there are {known or 'none'}"
    )


class Runs:
    """The settings of a pipeline's runs, each of which follows from those before.

    Args:
        config: The pipeline.
        folder: Its folder, absolute.
    """

    def __init__(self, config: PipelineConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._known: dict[str, RunConfig[Any]] = {}

    def folder(self, name: str) -> RunFolder:
        """Return the run folder of a step."""
        return RunFolder(self._folder / name)

    def config(
        self, step: Step, teacher: str | None = None, *, whole: Source | None = None
    ) -> RunConfig[Any]:
        """Return the run of a step; those before it were asked for already.

        Args:
            step: Which.
            teacher: The step that teaches it, if any does.
            whole: The images of the pretraining, if they are open.

        Raises:
            ConfigError: If the settings make no run.
        """
        common = _as_overrides(self._config.set)
        overrides = [*common, *step.overrides]
        given = [parse_override(override)[0] for override in step.overrides]
        if step.kind == "pretrain":
            base = read_run_values(Path(self._config.base))
            values = drop_idle(base, apply_overrides(base, overrides), given)
        elif step.kind == "distill":
            assert teacher is not None
            values = distill_from(self._origin(teacher), overrides, whole=whole)
        else:
            values = finetune_from(self._origin(_PRETRAIN), overrides, whole=whole)
        # What is set for all steps, or comes from the one before, may be of no use to this one.
        values = drop_idle({}, values, given) if step.kind != "pretrain" else values
        track = self._config.track.model_dump(mode="json")
        fixed = {"name": step.name, "output_dir": str(self._folder), "track": track}
        found = run_from_user(values | fixed, where=f"step {step.name}")
        self._known[step.name] = found
        return found

    def _origin(self, name: str) -> RunOrigin:
        return origin_of(self._known[name], self._folder / name)


def _as_overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return dotted settings as overrides; JSON is YAML."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in plain_copy(settings).items())


def _percent(share: float) -> str:
    return f"{100 * share:g}percent"
