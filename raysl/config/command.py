"""`raysl config`: print a resolved run and its derived values, or list the configurations."""

import argparse
from pathlib import Path
from typing import Any

from raysl.config.shipped import first_clause, shipped_configs
from raysl.config.yaml_text import to_yaml
from raysl.errors import ConfigError
from raysl.evaluate.training_source import open_training_source
from raysl.folder.address import path_or_address
from raysl.folder.whole import write_text
from raysl.report.terminal import console, mapping_table, print_json, say, say_notes
from raysl.run.check import check_names, check_start
from raysl.run.places import with_absolute_files
from raysl.run.recipe import derived_facts, load_run
from raysl.store.reading import local_copy
from raysl.track.run_folder import working_folder

# The folders of shipped configurations, with their headings.
_GROUPS = {
    "": "raysl pretrain NAME: recipes as published, and the quickstart",
    "ten_minutes": "raysl pretrain NAME: every method for ten minutes on two CPU cores",
    "sweeps": "raysl sweep NAME",
    "pipelines": "raysl pipeline NAME",
    "base": "extends: NAME, settings that other configurations share",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config",
        type=path_or_address,
        nargs="?",
        help="a YAML file, its address in a store, or the name of a shipped one",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--list",
        action="store_true",
        help="list the shipped configurations with a summary",
    )
    other.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="write a Markdown reference of all settings",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the resolved configuration after all checks that a run makes; start nothing."""
    if arguments.list:
        return _list(as_json=arguments.json)
    if arguments.reference is not None:
        # Imported here, since it loads every method and every verb's settings.
        from raysl.config_reference import reference  # noqa: PLC0415

        write_text(arguments.reference, reference())
        say(f"written: {arguments.reference}")
        return 0
    if arguments.config is None:
        raise ConfigError(
            "give a YAML file or the name of a shipped configuration; --list shows them"
        )
    config = load_run(local_copy(arguments.config), arguments.overrides)
    check_names(config)
    absolute = with_absolute_files(config, working_folder())
    source = open_training_source(absolute.data, absolute.evaluate, absolute.method)
    say_notes(source, title=f"{source.name}:")
    derived = check_start(absolute, source)
    facts = derived_facts(absolute, derived)
    values: dict[str, Any] = config.model_dump(mode="json")
    if arguments.json:
        print_json({"config": values, "derived": facts})
        return 0
    out = console()
    out.print(to_yaml(values), markup=False, end="")
    out.print(mapping_table("derived", facts))
    return 0


def _list(*, as_json: bool) -> int:
    """Print the names of the shipped configurations with the first line of each."""
    summaries = {name: first_clause(path) for name, path in shipped_configs().items()}
    if as_json:
        print_json({"configs": summaries})
        return 0
    width = max(map(len, summaries), default=0)
    for folder, title in _GROUPS.items():
        lines = [
            f"  {name:{width}}  {summary}"
            for name, summary in summaries.items()
            if name.rpartition("/")[0] == folder
        ]
        console().print("\n".join([title, *lines, ""]), markup=False)
    return 0
