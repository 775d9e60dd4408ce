"""`raysl finetune`: train a pretrained encoder on labels."""

import argparse
from pathlib import Path

import psutil

from raysl.commands.pretrain import train_run
from raysl.commands.terminal import print_json
from raysl.errors import ConfigError
from raysl.jobs.downstream import finetune_values, run_after
from raysl.recipe import load_run

CONFIG_SUFFIXES = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "origin",
        type=Path,
        help="a pretrained run folder, an encoder file, or the YAML file of a whole run",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value of the new run, such as data.labels.fraction=0.1 method.head_layers=1",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    parser.add_argument(
        "--fresh", action="store_true", help="start anew; an earlier run's folder is renamed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune, or go on with it; what is not said follows SimCLR v2, or MAE for a ViT."""
    origin: Path = arguments.origin
    is_config = origin.suffix in CONFIG_SUFFIXES
    if is_config:
        config = load_run(origin, arguments.overrides)
        if not config.method.classifies:
            raise ConfigError(
                f"{origin}: method {config.method.name} pretrains; give method supervised, or "
                f"raysl pretrain {origin}"
            )
    else:
        values = finetune_values(origin, arguments.overrides)
        config = run_after(values, arguments.overrides, where=str(origin))
    results = train_run(
        config,
        began_at=psutil.Process().create_time(),
        config_file=origin if is_config else None,
        fresh=arguments.fresh,
    )
    if arguments.json:
        print_json(results)
    return 0
