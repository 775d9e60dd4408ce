"""`raysl config`: print a run's resolved configuration and derived values."""

import argparse
from pathlib import Path
from typing import Any

from raysl.commands.absolute_files import with_absolute_files
from raysl.commands.terminal import console, mapping_table, print_json, say_notes
from raysl.config.load import to_yaml
from raysl.evaluate.training_source import open_training_source
from raysl.jobs.start import check_names, check_start
from raysl.recipe import load_run
from raysl.track.run_folder import working_folder

HELP = "print a resolved configuration and its derived values"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    parser.add_argument("--json", action="store_true", help="one JSON object instead")


def run(arguments: argparse.Namespace) -> int:
    """Print the resolved configuration; find all that a start would refuse, but start nothing."""
    config = load_run(arguments.config, arguments.overrides)
    check_names(config)
    placed = with_absolute_files(config, working_folder())
    source = open_training_source(placed.data, placed.evaluate, placed.method)
    say_notes(source, title=f"{source.name}:")
    derived = check_start(placed, source)
    values: dict[str, Any] = config.model_dump(mode="json")
    if arguments.json:
        print_json({"config": values, "derived": derived._asdict()})
        return 0
    out = console()
    out.print(to_yaml(values), markup=False, end="")
    out.print(mapping_table("derived", derived._asdict()))
    return 0
