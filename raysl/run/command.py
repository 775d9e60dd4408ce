"""`raysl pretrain`: train an encoder on unlabelled images."""

import argparse

from raysl.folder.address import path_or_address


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
    from raysl.run import typed_run  # noqa: PLC0415 - loads torch and ray

    return typed_run.run(arguments)
