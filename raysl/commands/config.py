"""`raysl config`: the resolved run, and what follows from it."""

import argparse
from pathlib import Path
from typing import Any

from raysl.commands.terminal import console, mapping_table, print_json, say_notes
from raysl.config.load import to_yaml
from raysl.evaluate.training_source import open_training_source
from raysl.jobs.run_places import with_absolute_sources
from raysl.recipe import derive_for, load_run

HELP = "print a resolved configuration and its derived values"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    parser.add_argument("--json", action="store_true", help="one JSON object instead")


def run(arguments: argparse.Namespace) -> int:
    """Print the resolved configuration; open the source to count its images."""
    config = load_run(arguments.config, arguments.overrides)
    placed = with_absolute_sources(config)
    source = open_training_source(placed.data, placed.evaluate, placed.method)
    say_notes(source, title=f"{source.name}:")
    derived = derive_for(config, source)
    values: dict[str, Any] = config.model_dump(mode="json")
    if arguments.json:
        print_json({"config": values, "derived": derived._asdict()})
        return 0
    out = console()
    out.print(to_yaml(values), markup=False, end="")
    out.print(mapping_table("derived", derived._asdict()))
    return 0
