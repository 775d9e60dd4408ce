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
from raysl.track.config import OutputDir, TrackConfig, check_run_name

Kind = Literal["pretrain", "finetune", "linear", "scratch", "distill"]
_Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
_PRETRAIN = "pretrain"


class FinetuneStep(Config):
    """Runs that learn from labels, one per share of the labels and head layer."""

    labels: Annotated[tuple[_Fraction, ...], Field(min_length=1)] = (0.01, 0.1)
    """Shares of the labels, class-balanced; a smaller one lies within a larger one."""
    start: Literal["pretrained", "random"] = "pretrained"
    """Initial weights: those of the pretrained encoder, or random ones, for comparison."""
    head_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1,)
    """Layers of the projection head to keep; 0 keeps the encoder alone."""
    freeze_encoder: bool = False
    """Do not train the encoder; with head_layers [0], this is linear evaluation."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of these runs, such as train.epochs."""


class Student(Config):
    """Runs that distil, one per share of the labels that a teacher was fine-tuned on."""

    name: str
    """Name of the student; its runs are distill-PERCENT-NAME."""
    labels: tuple[_Fraction, ...] | None = None
    """Shares of the labels of its teachers; null uses every share that has a teacher."""
    teacher: Annotated[int, Field(ge=0)] | str = 1
    """The teacher: a number selects the fine-tuned run with that many head layers; best selects the
    run with the highest accuracy on the test images, which biases the accuracy of the student
    slightly upwards; a name selects an earlier student (the paper distils into the same size first,
    then into a smaller one)."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of these runs, such as backbone.width."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        return check_run_name(name)


class PipelineConfig(Config):
    """A pretraining, and the runs that start from it."""

    name: str
    """The folder is output_dir/name, with a folder per run; the same name resumes the pipeline."""
    output_dir: OutputDir = "runs"
    """Parent of the pipeline's folder: a path or an address of a store."""
    base: str
    """The YAML file of the pretraining, relative to this one."""
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of the pretraining, on top of base."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted settings of every run; those of a step take precedence."""
    finetune: Annotated[tuple[FinetuneStep, ...], Field(min_length=1)] = (FinetuneStep(),)
    """The runs to fine-tune."""
    distill: tuple[Student, ...] = ()
    """The students to distil."""
    track: TrackConfig = TrackConfig()
    """MLflow gets one run for the pipeline, with a nested run per step."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        return check_run_name(name)


class Step(NamedTuple):
    """One run of a pipeline."""

    name: str
    kind: Kind
    labels: float | None
    """Share of the labels that the run or its teacher uses; None for pretraining."""
    head_layers: int | None
    """Layers of the projection head to keep; None if the step has no such setting."""
    teachers: tuple[str, ...]
    """Names of the candidate teachers; the one with the highest accuracy teaches."""
    overrides: tuple[str, ...]
    """Overrides of the settings derived from the previous step."""


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline; its name defaults to the file's, and ``base`` becomes an absolute path.

    An override that starts with a field of the pipeline changes the pipeline, such as
    ``pretrain.train.epochs=5``. One that starts with a field of a run applies to every run, such as
    ``data.source=FOLDER``.

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
            f"override {text!r}: {first!r} is a setting of neither a pipeline nor a run; {hint}"
        )


def plan_steps(config: PipelineConfig) -> list[Step]:
    """Return the runs of a pipeline in order; each needs only earlier ones.

    Raises:
        ConfigError: If two steps have the same name, or a student has no teacher.
    """
    steps = [Step(_PRETRAIN, "pretrain", None, None, (), _as_overrides(config.pretrain))]
    for block in config.finetune:
        steps += list(_finetune_steps(block))
    for student in config.distill:
        steps += list(_distill_steps(student, steps))
    names = [step.name for step in steps]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ConfigError(
            f"finetune and distill: the steps {', '.join(duplicates)} occur twice; name each share "
            f"of labels and layer once, and give students different names"
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
    num_runs = 0
    for share in shares:
        if isinstance(student.teacher, int):
            layer = student.teacher
            teachers = [s.name for s in tuned if s.labels == share and s.head_layers == layer]
        elif student.teacher == "best":
            teachers = [s.name for s in tuned if s.labels == share]
        else:
            wanted = f"distill-{_percent(share)}-{student.teacher}"
            teachers = [s.name for s in steps if s.name == wanted]
        if not teachers and student.labels is not None:
            raise _no_teacher(student, share, steps)
        if teachers:
            num_runs += 1
            name = f"distill-{_percent(share)}-{student.name}"
            yield Step(name, "distill", share, None, tuple(teachers), _as_overrides(student.set))
    if not num_runs:
        raise _no_teacher(student, None, steps)


def _no_teacher(student: Student, share: float | None, steps: Sequence[Step]) -> ConfigError:
    candidates = ", ".join(step.name for step in steps if step.kind in ("finetune", "distill"))
    among = "" if share is None else f" with {100 * share:g} % of the labels"
    return ConfigError(
        f"distill: the student {student.name!r} has teacher={student.teacher!r}, and there is no "
        f"such run{among}; there are {candidates or 'none'}"
    )


class RunConfigs:
    """The settings of a pipeline's runs, each derived from earlier runs.

    Args:
        config: The pipeline's configuration.
        place: Path or address of the pipeline's folder; the path is absolute.
    """

    def __init__(self, config: PipelineConfig, place: Path | str) -> None:
        self._config = config
        self._place = place
        self._built: dict[str, RunConfig[Any]] = {}

    def config(
        self, step: Step, teacher: str | None = None, *, whole: Source | None = None
    ) -> RunConfig[Any]:
        """Return the configuration of a step; those of the steps it depends on come first.

        Args:
            step: The step.
            teacher: Name of the step that teaches; None unless the step distils.
            whole: All images of the pretraining, if already open; None opens them.

        Raises:
            ConfigError: If the settings are not valid.
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
        # Settings for all steps, or from the previous one, may have no effect on this step.
        values = drop_idle({}, values, given) if step.kind != "pretrain" else values
        track = self._config.track.model_dump(mode="json")
        track["tracking_uri"] = self._config.track.tracking_uri  # dumps leave its password out
        fixed = {"name": step.name, "output_dir": str(self._place), "track": track}
        run = run_from_user(values | fixed, where=f"step {step.name}")
        self._built[step.name] = run
        return run

    def _origin(self, name: str) -> RunOrigin:
        return origin_of(self._built[name], f"{self._place}/{name}")


def _as_overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return dotted settings as overrides; JSON is YAML."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in plain_copy(settings).items())


def _percent(share: float) -> str:
    return f"{100 * share:g}percent"
