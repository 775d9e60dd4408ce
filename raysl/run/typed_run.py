"""Train the run of a command line."""

import argparse

import psutil

from raysl.report.terminal import print_json
from raysl.run.pretrain import train_run
from raysl.run.recipe import load_run
from raysl.run.shell import Typed
from raysl.store.reading import local_copy


def run(arguments: argparse.Namespace) -> int:
    """Train or resume a run; see :mod:`raysl.run.command` for the arguments."""
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
