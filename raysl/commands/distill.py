"""`raysl distill`: train a student on the predictions of a fine-tuned teacher."""

import argparse
from pathlib import Path

import psutil

from raysl.commands.pretrain import train_run
from raysl.commands.terminal import print_json
from raysl.jobs.downstream import distill_values, run_after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("teacher", type=Path, help="the folder of a fine-tuned run")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value of the student's run, such as backbone.name=resnet18 train.epochs=100",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    parser.add_argument(
        "--fresh", action="store_true", help="start anew; an earlier run's folder is renamed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Distil, or go on with it; what is not said follows SimCLR v2."""
    values = distill_values(arguments.teacher, arguments.overrides)
    config = run_after(values, arguments.overrides, where=str(arguments.teacher))
    results = train_run(config, began_at=psutil.Process().create_time(), fresh=arguments.fresh)
    if arguments.json:
        print_json(results)
    return 0
