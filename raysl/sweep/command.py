"""`raysl sweep`: draw the trials, check them all, run them on Ray Tune, compare them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from raysl.report.terminal import console, print_json
from raysl.run.held import check_reachable, held_folder, place_of
from raysl.run.places import with_absolute_files
from raysl.run.recipe import RunConfig
from raysl.sweep.check import check
from raysl.sweep.config import SweepConfig
from raysl.sweep.load import load_sweep
from raysl.sweep.measured import MetricCheck
from raysl.sweep.sources import Sources
from raysl.sweep.space import Candidate, draw
from raysl.sweep.start import SweepStart
from raysl.sweep.trial import SWEEP, SweepFolder, claim
from raysl.sweep.watch import short_text
from raysl.track.run_folder import working_folder
from raysl.track.uri import check_tracking_uri


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", type=Path, help="a YAML file, or the name of one of raysl's")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value of the sweep (budget.trials=20), or of all its runs (data.source=FOLDER)",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and list the trials without starting"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run or resume the sweep of the configuration."""
    sweep = load_sweep(arguments.config, arguments.overrides)
    home = working_folder()
    check_reachable(sweep.output_dir, uses_ray=True)
    place = place_of(sweep.output_dir, sweep.name, home)
    if sweep.track.mlflow:
        check_tracking_uri(sweep.track.tracking_uri)
    candidates = draw(sweep)
    sources = Sources()
    measured = MetricCheck(sweep.metric)

    def check_run(config: RunConfig[Any]) -> None:
        sources.check(config)
        measured.check(config, sources.of(config))

    configs = check(sweep, candidates, folder=place, check_run=check_run)
    sources.say_notes()
    measured.say_notes()
    if arguments.dry_run:
        _print_candidates(sweep, candidates)
        return 0
    runs = [with_absolute_files(config, home) for config in configs]
    with held_folder(place, SweepFolder, SWEEP) as folder:
        claim(folder, sweep)
        start = SweepStart(sweep, folder, home=home, sources=sources)
        results = start.run(list(zip(candidates, runs, strict=True)))
    if arguments.json:
        print_json(results)
    start.raise_problems()
    return 0


def _print_candidates(sweep: SweepConfig, candidates: Sequence[Candidate]) -> None:
    table = Table(title=f"{sweep.name}: {len(candidates)} trials", title_justify="left")
    keys = list(dict.fromkeys(key for candidate in candidates for key in candidate.params))
    for title in ("trial", *keys):
        table.add_column(title)
    for candidate in candidates:
        cells = (escape(short_text(candidate.params.get(key, ""))) for key in keys)
        table.add_row(f"{candidate.number:04d}", *cells)
    console().print(table)
