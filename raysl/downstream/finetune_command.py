"""`raysl finetune`: train a pretrained encoder on labels."""

import argparse
from pathlib import Path

import psutil

from raysl.config.shipped import find_config
from raysl.errors import ConfigError
from raysl.folder.address import path_or_address
from raysl.report.terminal import print_json, say
from raysl.run.command import add_start_arguments
from raysl.run.from_run import finetune_values, run_after
from raysl.run.places import dropped_settings_note
from raysl.run.pretrain import train_run
from raysl.run.recipe import load_run
from raysl.run.shell import Typed, command
from raysl.run.stored import named_after
from raysl.store.reading import local_copy

CONFIG_SUFFIXES = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "origin",
        type=path_or_address,
        help="a pretrained run folder or its address in a store, an encoder file, or the YAML "
        "file of a whole run",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value of the new run, such as data.labels.fraction=0.1 method.head_layers=1",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    add_start_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune, or resume it; settings that are not given follow SimCLR v2, or MAE for a ViT."""
    given: Path | str = arguments.origin
    origin = local_copy(given)
    is_shipped = not origin.exists() and find_config(origin).is_file()
    is_config = is_shipped or origin.suffix in CONFIG_SUFFIXES
    if is_config:
        config = load_run(origin, arguments.overrides)
        if not config.method.classifies:
            raise ConfigError(
                f"{origin}: method {config.method.name} pretrains; give method supervised, or "
                f"{command('pretrain', origin, *arguments.overrides)}"
            )
    else:
        note = dropped_settings_note(
            origin, arguments.overrides, test_key="evaluate.source", never=["data.labels"]
        )
        if note:
            say(note)
        with named_after(given, origin) as names:
            values = names(finetune_values(origin, arguments.overrides))
        config = run_after(values, arguments.overrides, where=str(given))
    results = train_run(
        config,
        began_at=psutil.Process().create_time(),
        typed=Typed(origin, tuple(arguments.overrides)) if is_config else None,
        fresh=arguments.fresh,
        extend=arguments.extend,
    )
    if arguments.json:
        print_json(results)
    return 0
