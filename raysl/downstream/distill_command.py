"""`raysl distill`: train a student on the predictions of a fine-tuned teacher."""

import argparse
from pathlib import Path

import psutil

from raysl.folder.address import path_or_address
from raysl.report.terminal import print_json, say
from raysl.run.command import add_start_arguments
from raysl.run.from_run import distill_values, run_after
from raysl.run.places import dropped_settings_note
from raysl.run.pretrain import train_run
from raysl.run.stored import named_after
from raysl.store.reading import local_copy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "teacher",
        type=path_or_address,
        help="the folder of a fine-tuned run, or its address in a store",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value of the student's run, such as backbone.name=resnet18 train.epochs=100",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    add_start_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Distil a teacher, or resume it; settings that are not given follow SimCLR v2."""
    given: Path | str = arguments.teacher
    teacher = local_copy(given)
    note = dropped_settings_note(teacher, arguments.overrides, test_key="evaluate.source")
    if note:
        say(note)
    with named_after(given, teacher) as names:
        values = names(distill_values(teacher, arguments.overrides))
    config = run_after(values, arguments.overrides, where=str(given))
    results = train_run(
        config,
        began_at=psutil.Process().create_time(),
        fresh=arguments.fresh,
        extend=arguments.extend,
    )
    if arguments.json:
        print_json(results)
    return 0
