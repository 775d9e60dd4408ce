"""`raysl benchmark`: measure input, plan, loss and embedding on this machine or cluster."""

import argparse
import math

from raysl.benchmark import embed_command, input_command, loss_command, plan_command
from raysl.report.terminal import print_json

_RUN = {
    "input": input_command.run,
    "plan": plan_command.run,
    "loss": loss_command.run,
    "embed": embed_command.run,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and the arguments of each."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    input_command.add_arguments(kinds, whole=_whole, positive=_positive)
    plan_command.add_arguments(kinds, wholes=_wholes)
    loss_command.add_arguments(kinds, whole=_whole, wholes=_wholes)
    embed_command.add_arguments(kinds, whole=_whole, positive=_positive)


def run(arguments: argparse.Namespace) -> int:
    """Run a benchmark."""
    results = _RUN[arguments.what](arguments)
    if arguments.json:
        print_json(results)
    return 0


def _whole(text: str) -> int:
    """Parse a whole number above 0, which may be written as 1e9."""
    number = float(text)
    if not (number >= 1 and number.is_integer()):
        raise argparse.ArgumentTypeError(f"give a whole number, at least 1; got {text}")
    return int(number)


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"give a number above 0; got {text}")
    return number


def _wholes(text: str) -> list[int]:
    """Parse whole numbers above 0, separated by commas."""
    return [_whole(part) for part in text.split(",")]
