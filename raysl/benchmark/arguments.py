"""Arguments that several benchmarks take, and the numbers in them."""

import argparse
import math
from pathlib import Path

_STEPS = 20


def add_benchmark(
    kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str
) -> argparse.ArgumentParser:
    """Add a subcommand of `raysl benchmark` and return its parser."""
    return kinds.add_parser(name, help=summary, description=f"raysl benchmark {name}: {summary}")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the configuration of a run and its overrides."""
    parser.add_argument(
        "config",
        type=Path,
        help="a YAML file, or the name of a shipped configuration such as quickstart",
    )
    parser.add_argument(
        "overrides", nargs="*", help="settings as section.key=value, with YAML values"
    )


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Declare the number of training steps to time."""
    parser.add_argument(
        "--steps",
        type=whole,
        default=_STEPS,
        help=f"steps to time, rounded up to whole logging intervals ({_STEPS})",
    )


def add_repeats(parser: argparse.ArgumentParser) -> None:
    """Declare the number of rounds."""
    parser.add_argument("--repeats", type=whole, default=3, help="number of rounds (3)")


def add_rounds(parser: argparse.ArgumentParser, *, seconds: float, after: str = "") -> None:
    """Declare the number of rounds and their length.

    Args:
        parser: The benchmark's parser.
        seconds: Default of ``--seconds``.
        after: What the time of a measurement leaves out, for the help text.
    """
    add_repeats(parser)
    parser.add_argument(
        "--seconds",
        type=positive,
        default=seconds,
        help=f"duration of each measurement in seconds{after} ({seconds:g})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare ``--json``; it comes last, as in the help of every command."""
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def whole(text: str) -> int:
    """Parse a whole number above 0, which may be written as 1e9."""
    number = float(text)
    if not (number >= 1 and number.is_integer()):
        raise argparse.ArgumentTypeError(f"give a whole number, at least 1; got {text}")
    return int(number)


def wholes(text: str) -> list[int]:
    """Parse whole numbers above 0, separated by commas."""
    return [whole(part) for part in text.split(",")]


def positive(text: str) -> float:
    """Parse a number above 0."""
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"give a number above 0; got {text}")
    return number
