"""Write the report of a sweep: its pictures, and a page with the best trial and all others."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from raysl.config.yaml_text import to_yaml
from raysl.report.document import (
    collapsible,
    draw_each,
    escape,
    files_section,
    picture_html,
    section,
    write_page,
)
from raysl.report.measure import (
    Measure,
    duration_text,
    measure,
    short_names,
    value_text,
)
from raysl.sweep.config import MetricConfig, SweepConfig
from raysl.sweep.parameter import parameters
from raysl.sweep.pictures import (
    draw_heat_map,
    draw_importance,
    draw_parameters,
    draw_trial_curves,
    heat_axes,
)
from raysl.sweep.summary import Summary, is_number, means_over_seeds
from raysl.sweep.trial import SweepFolder, Trial
from raysl.sweep.trial_marks import STATUS_TEXTS

_FILES = (
    ("sweep.yaml", "the sweep, every setting resolved"),
    ("best.yaml", "the run of the best trial, for <code>raysl pretrain</code>"),
    ("summary.json", "the numbers of this page"),
    ("trials", "one run folder per trial, named by its number"),
    ("pictures", "the pictures of this page"),
    ("mlflow.json", "the MLflow run of the sweep"),
)
_CURVES = "Look for curves that cross late: a slow starter may have been stopped too early."
_HEAT_MAP = (
    "Look for where the bright cells lie, and whether they move from panel to panel; each is the "
    "mean of its trials."
)
_PARAMETERS = (
    "Look for best values at the end of a range: widen it there. Bars: medians of finished trials; "
    "dots on the edge are out of range."
)


def draw_sweep(
    folder: SweepFolder,
    sweep: SweepConfig,
    trials: Sequence[Trial],
    summary: Summary,
    *,
    next_line: str | None,
) -> list[tuple[str, str]]:
    """Draw the pictures of a sweep, then write its page.

    Thread-safe. A picture that fails is missing from the page, and its previous file is removed;
    the others are still drawn.

    Args:
        folder: Receives ``pictures/*.png`` and ``report.html``.
        sweep: The sweep.
        trials: All trials, in any order and state.
        summary: The summary of these trials.
        next_line: The command for a long run with the settings of the best trial; None if no
            trial is best.

    Returns:
        The name and the error of each picture, or of ``report``, that failed.
    """
    drawings = _drawings(sweep, trials, summary)
    failures = draw_each(folder.pictures, drawings)
    for old in folder.pictures.glob("*.png"):
        if old.stem not in drawings:
            old.unlink()
    try:
        _write_page(folder, sweep, trials, summary, next_line=next_line, pictures=list(drawings))
    except Exception as error:  # a failed page must not end the sweep
        failures.append(("report", f"{type(error).__name__}: {error}"))
    return failures


def _drawings(
    sweep: SweepConfig, trials: Sequence[Trial], summary: Summary
) -> dict[str, Callable[[Path], None]]:
    """Return the drawing functions by name, in the order of the page."""
    metric, best = sweep.metric, summary.best
    varied = parameters(trials, sweep.space)
    axes = heat_axes(trials, varied, summary.importance)
    measured = any(trial.metric is not None and trial.status != "failed" for trial in trials)
    drawings: dict[str, Callable[[Path], None]] = {}
    if any(trial.curve for trial in trials):
        drawings["curves"] = partial(draw_trial_curves, trials=trials, metric=metric, best=best)
    if measured and axes is not None:
        drawings["heat_map"] = partial(draw_heat_map, trials=trials, metric=metric, axes=axes)
    if summary.importance:
        drawings["importance"] = partial(draw_importance, importance=summary.importance)
    if measured and varied:
        ranked = sorted(varied, key=lambda one: -summary.importance.get(one.key, 0.0))
        drawings["parameters"] = partial(
            draw_parameters, trials=trials, metric=metric, parameters=ranked, best=best
        )
    return drawings


def _write_page(
    folder: SweepFolder,
    sweep: SweepConfig,
    trials: Sequence[Trial],
    summary: Summary,
    *,
    next_line: str | None,
    pictures: Sequence[str],
) -> None:
    display = measure(sweep.metric.name)
    captions = {
        "curves": ("Learning curves", _CURVES),
        "heat_map": ("Two parameters at a time", _HEAT_MAP),
        "importance": ("What matters", _about_importance(summary)),
        "parameters": ("Each parameter by itself", _PARAMETERS),
    }
    sections = [_best_section(summary, display, next_line), _seeds_section(trials, sweep, display)]
    for name in pictures:
        title, note = captions[name]
        picture = f"<div class='scroll wide'>{picture_html(folder.pictures, name, title)}</div>"
        sections.append(section(title, picture, note))
    sections += [
        _trials_section(sweep, summary, display),
        _failed_section(summary),
        _settings_section(sweep),
        files_section(folder.path, _FILES, shown=folder.shown()),
    ]
    lead = _lead(summary, sweep.metric)
    write_page(folder.report, name=sweep.name, lead=lead, sections=sections)


def _lead(summary: Summary, metric: MetricConfig) -> str:
    """Summarise the trials and the result in two sentences."""
    trials, best, display = summary.ranking, summary.best, measure(metric.name)
    counts = ", ".join(
        f"{summary.counts[status]} {text}"
        for status, text in STATUS_TEXTS.items()
        if summary.counts.get(status)
    )
    spent = duration_text(sum(trial.seconds for trial in trials))
    tried = f"{len(trials)} trial{'' if len(trials) == 1 else 's'}: {counts}; {spent} of training."
    if best is None or best.metric is None:
        return f"{tried} Nothing was measured yet."
    value = escape(f"{display.text(best.metric)} {display.unit}".rstrip())
    title = "Best" if best.status == "finished" else "Best so far, not finished"
    seed_mean = next((g for g in means_over_seeds(trials, metric) if best in g.trials), None)
    seeds = ""
    if seed_mean is not None and seed_mean.std is not None:
        seeds = (
            f"; its {len(seed_mean.trials)} seeds {display.text(seed_mean.mean)} &plusmn; "
            f"{display.text(seed_mean.std)}"
        )
    return (
        f"{tried} {title}: trial {best.number}, {_lower(display.words)} {value} after "
        f"{best.epoch:.4g} epoch{'' if best.epoch == 1 else 's'}{seeds}."
    )


def _lower(words: str) -> str:
    return escape(words[:1].lower() + words[1:])


def _best_section(summary: Summary, display: Measure, next_line: str | None) -> str:
    best = summary.best
    if best is None:
        return ""
    rows = "\n".join(
        f"<tr><th scope=row><code>{escape(key)}</code><td>{escape(value_text(value))}"
        for key, value in best.params.items()
    )
    table = f"<div class=scroll><table>\n{rows}\n</table></div>" if rows else ""
    line = f"<pre class=command>{escape(next_line)}</pre>" if next_line else ""
    return section(
        f"Best: trial {best.number}",
        table + line,
        line and "The run of this trial, ten times as long.",
    )


def _seeds_section(trials: Sequence[Trial], sweep: SweepConfig, display: Measure) -> str:
    """Return a table of means over seeds, if there are several seeds."""
    means = means_over_seeds(trials, sweep.metric)
    if all(len(group.trials) < 2 for group in means):
        return ""
    columns = _parameter_columns([group.params for group in means])
    values = [display.text(group.mean) for group in means]
    spread = ["" if g.std is None else display.text(g.std) for g in means]
    columns += [
        _Column(display.title, values),
        _Column("\u00b1", spread),
        _Column("seeds", [str(len(group.trials)) for group in means]),
    ]
    note = (
        "Mean and standard deviation over the seeds that finished, best first; a difference no "
        "larger than the standard deviations may be chance."
    )
    return section("Means over seeds", _table(columns), note)


def _trials_section(sweep: SweepConfig, summary: Summary, display: Measure) -> str:
    ranking = summary.ranking
    columns = [
        _Column("trial", [str(trial.number) for trial in ranking], is_text=True),
        _Column(display.title, [_value_text(display, trial.metric) for trial in ranking]),
    ]
    for key in sweep.metric.also:
        other = measure(key)
        columns.append(_Column(other.title, [_value_text(other, t.also.get(key)) for t in ranking]))
    texts = [STATUS_TEXTS[trial.status] for trial in ranking]
    columns.append(_Column("status", texts, is_text=True))
    columns += _parameter_columns([trial.params for trial in ranking])
    columns += [
        _Column("epochs", [f"{trial.epoch:.4g}" for trial in ranking]),
        _Column("time", [duration_text(trial.seconds) for trial in ranking]),
    ]
    note = (
        "Finished trials by their metric, then the others by the epoch they reached. The marked "
        "trial is the best."
    )
    best = None if summary.best is None else ranking.index(summary.best)
    return section("All trials", _table(columns, marked=best), note)


def _value_text(display: Measure, value: float | None) -> str:
    return "" if value is None else display.text(value)


class _Column(NamedTuple):
    """One column of a table; its texts are not escaped yet."""

    head: str
    texts: Sequence[str]
    is_text: bool = False


def _parameter_columns(rows: Sequence[Mapping[str, Any]]) -> list[_Column]:
    """Return a column for each parameter; empty where a trial lacks it."""
    names = short_names(dict.fromkeys(key for row in rows for key in row))
    return [
        _Column(
            name,
            [value_text(row[key]) if key in row else "" for row in rows],
            is_text=not all(is_number(row[key]) for row in rows if key in row),
        )
        for key, name in names.items()
    ]


def _table(columns: Sequence[_Column], *, marked: int | None = None) -> str:
    """Return a table that scrolls sideways with a fixed first column; one row may be marked."""
    kinds = ["" if column.is_text else " class=n" for column in columns]
    heads = zip(kinds, columns, strict=True)
    lines = ["<tr>" + "".join(f"<th scope=col{kind}>{escape(c.head)}" for kind, c in heads)]
    for number, texts in enumerate(zip(*(column.texts for column in columns), strict=True)):
        first, *rest = (escape(text) for text in texts)
        cells = "".join(f"<td{kind}>{text}" for kind, text in zip(kinds[1:], rest, strict=True))
        begin = "<tr class=best>" if number == marked else "<tr>"
        lines.append(f"{begin}<th scope=row>{first}{cells}")
    return "<div class=scroll><table class=trials>\n" + "\n".join(lines) + "\n</table></div>"


def _failed_section(summary: Summary) -> str:
    failed = [trial for trial in summary.ranking if trial.status == "failed"]
    rows = "\n".join(
        f"<tr><th scope=row>{trial.number}<td>{escape(trial.error or 'no error was recorded')}"
        for trial in failed
    )
    return section("Failed trials", f"<table>\n{rows}\n</table>") if failed else ""


def _settings_section(sweep: SweepConfig) -> str:
    text = escape(to_yaml(sweep.model_dump(mode="json")))
    return section("Settings", collapsible("The sweep, every value resolved", f"<pre>{text}</pre>"))


def _about_importance(summary: Summary) -> str:
    where = "at their end"
    if summary.compared_at_epoch is not None:
        where = f"at epoch {summary.compared_at_epoch:.3g}, which all reached"
    return f"A rough guide: look for the few that matter. Trials are compared {where}."
