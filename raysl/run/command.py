"""`raysl pretrain`: train an encoder on unlabelled images."""

import argparse

import psutil

from raysl.folder.address import path_or_address
from raysl.report.terminal import print_json
from raysl.run.pretrain import train_run
from raysl.run.recipe import load_run
from raysl.run.shell import Typed
from raysl.store.reading import local_copy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config",
        type=path_or_address,
        help="a YAML file, its address in a store, or the name of a shipped configuration, such as "
        "quickstart",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    add_start_arguments(parser)


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say what to do if the run folder exists."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--fresh", action="store_true", help="start over; rename an earlier run's folder"
    )
    group.add_argument(
        "--extend",
        action="store_true",
        help="extend an earlier run to the larger train.epochs or train.steps given here",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train or resume the run of the configuration."""
    config = load_run(local_copy(arguments.config), arguments.overrides)
    results = train_run(
        config,
        began_at=psutil.Process().create_time(),
        typed=Typed(arguments.config, tuple(arguments.overrides)),
        fresh=arguments.fresh,
        extend=arguments.extend,
    )
    if arguments.json:
        print_json(results)
    return 0
