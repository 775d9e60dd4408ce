"""`raysl benchmark`: measure parts of the work on this machine or cluster."""

import argparse

from raysl.benchmark import (
    embed_command,
    input_command,
    loss_command,
    plan_command,
    scale_command,
    step_command,
)
from raysl.report.terminal import print_json

_RUN = {
    "input": input_command.run,
    "plan": plan_command.run,
    "loss": loss_command.run,
    "embed": embed_command.run,
    "step": step_command.run,
    "scale": scale_command.run,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and the arguments of each."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    input_command.add_arguments(kinds)
    plan_command.add_arguments(kinds)
    loss_command.add_arguments(kinds)
    embed_command.add_arguments(kinds)
    step_command.add_arguments(kinds)
    scale_command.add_arguments(kinds)


def run(arguments: argparse.Namespace) -> int:
    """Run a benchmark."""
    results = _RUN[arguments.what](arguments)
    if arguments.json:
        print_json(results)
    return 0
