"""`raysl benchmark methods`: train configurations one after the other and compare them."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raysl.benchmark.methods import (
    MethodRun,
    markdown_table,
    read_run,
    replace_section,
    train_in_own_process,
)
from raysl.benchmark.methods_picture import draw_gains, draw_loss_curves
from raysl.errors import ConfigError, RayslError
from raysl.folder.whole import write_text
from raysl.report.terminal import console, mapping_table, say
from raysl.run.recipe import load_run
from raysl.run.shell import command

SECTION = "methods"


def add_arguments(kinds: Any) -> None:
    """Declare the benchmark's arguments."""
    text = "methods: train configurations one after the other, compare accuracy and loss"
    parser = kinds.add_parser("methods", help=text, description=f"raysl benchmark {text}")
    parser.add_argument(
        "configs", nargs="+", help="YAML files, then section.key=value for all of them"
    )
    parser.add_argument(
        "--into", type=Path, help="Markdown file; its section 'methods' receives table and pictures"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="concurrent runs (1); they share cores"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is not finished yet, then compare.

    Raises:
        ConfigError: If a configuration is wrong; all are read before the first one starts.
        RayslError: If no run could be compared.
    """
    paths = [Path(word) for word in arguments.configs if "=" not in word]
    overrides = [word for word in arguments.configs if "=" in word]
    if not paths:
        raise ConfigError("give at least one YAML file, such as configs/ten_minutes/simclr.yaml")
    names = [load_run(path, overrides).name for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several configurations have the run name {', '.join(twice)}")
    runs: list[MethodRun] = []
    failed: dict[str, str] = {}

    def train(place: int) -> None:
        path, name = paths[place], names[place]
        say(f"[{place + 1}/{len(paths)}] {name}")
        try:
            folder = train_in_own_process(
                path, overrides, on_line=lambda line: say(f"  {name}: {line}")
            )
            runs.append(read_run(folder))
        except RayslError as error:
            failed[name] = str(error)
            say(f"  {name} failed: {error}")

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(train, range(len(paths))))
    runs.sort(key=lambda run: names.index(run.name))
    if not runs:
        raise RayslError("no run could be compared: " + "; ".join(failed.values()))
    console().print(_table(runs))
    if arguments.into is not None:
        _write(arguments.into, runs, command("benchmark methods", *arguments.configs))
    return {"runs": [r._asdict() for r in runs], "failed": failed}


def _table(runs: list[MethodRun]) -> Any:
    ordered = sorted(runs, key=lambda run: -run.knn_gain)
    return mapping_table(
        "kNN accuracy before training -> after; minutes",
        {
            run.name: f"{run.untrained_knn_top1:.3f} -> {run.knn_top1:.3f}   "
            f"{run.seconds / 60:.1f} min"
            for run in ordered
        },
    )


def _write(path: Path, runs: list[MethodRun], asked: str) -> None:
    """Put table and pictures into a Markdown file; the pictures lie beside it."""
    curves, gains = (path.with_name(f"methods_{what}.png") for what in ("losses", "gains"))
    draw_loss_curves(curves, runs)
    draw_gains(gains, runs)
    content = (
        f"{markdown_table(runs)}\n\n"
        f"![Accuracy before and after]({gains.name})\n\n![Loss curves]({curves.name})\n\n"
        f"`{asked}`"
    )
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, replace_section(old, name=SECTION, content=content))
    say(f"written: {path}, {curves.name}, {gains.name}")
