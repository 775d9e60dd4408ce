"""The `raysl` command: each verb is a module with ``add_arguments`` and ``run``."""

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

from raysl.errors import RayslError, Terminated
from raysl.run.stop import sigterm_raises

VERBS = {
    "pretrain": "train an encoder on unlabelled images, measure it, write it",
    "finetune": "train a pretrained encoder on labels, from any layer of its projection head",
    "distill": "train a student, as large or smaller, on the predictions of a fine-tuned teacher",
    "pipeline": "pretrain, fine-tune and distil from one configuration, and compare the results",
    "sweep": "try many settings of a run on Ray Tune, compare them, write the best configuration",
    "evaluate": "measure an encoder: nearest neighbours, linear, few labels, fine-tuning, transfer",
    "benchmark": "measure input, plan, embedding and loss on this machine or cluster, to size it",
    "config": "print a resolved configuration and its derived values",
    "data": "inspect a source of images: counts, sizes, formats, bad files, a contact sheet",
    "export": "write an encoder for torchvision, timm, ONNX, TorchScript, Hugging Face, MLflow",
    "import": "convert a checkpoint of MoCo, SimCLR, DINO, MAE, VISSL or lightly to an encoder",
    "pack": "turn any source of images into shuffled Parquet shards that stream fast",
    "embed": "write the features of any source of images to Parquet, on a whole cluster",
    "search": "find the images nearest to given ones, or to each other, among embeddings",
    "duplicates": "find near-duplicates among embeddings, and list those to drop",
}

# Modules of verbs other than raysl.VERB.command.
_MODULES = {
    "pretrain": "raysl.run.command",
    "finetune": "raysl.downstream.finetune_command",
    "distill": "raysl.downstream.distill_command",
    "pipeline": "raysl.downstream.pipeline_command",
    "evaluate": "raysl.downstream.evaluate_command",
    "data": "raysl.pack.data_command",
    "export": "raysl.exchange.export_command",
    "import": "raysl.exchange.import_command",
    "search": "raysl.embed.search_command",
    "duplicates": "raysl.embed.duplicates_command",
}

_DESCRIPTION = """\
raysl pretrains image encoders without labels, on Ray.

  raysl pretrain quickstart                        an encoder in minutes, on any laptop
  raysl pretrain CONFIG data.source=FOLDER         your own images: a folder, Parquet, s3://...
  raysl pretrain CONFIG optim.base_lr=0.1          any setting, by its dotted key
  raysl finetune RUN data.labels.fraction=0.1      the encoder of a run, on a tenth of the labels
  raysl distill FINETUNED_RUN backbone.width=0.5   train a smaller network on its predictions
  raysl pipeline simclr_v2_cifar10                 all three steps in one
  raysl sweep simclr_temperature_batch             many settings side by side, and the best one
  raysl evaluate RUN [data.source=...]             accuracy of its encoder, by fixed protocols
  raysl config CONFIG [overrides]                  check a run without starting it
  raysl config --list                              the configurations shipped with raysl
  raysl benchmark input CONFIG [overrides]         images/s that the CPUs can feed, by stage
  raysl benchmark step CONFIG [overrides]          what loop, DDP, Ray and stream add to a step
  raysl benchmark scale CONFIG --workers 1,2,4     images/s over the number of train workers
  raysl data SOURCE                                content and problems of a source
  raysl pack SOURCE OUT short_side_px=256          shuffled Parquet shards that stream fast
  raysl embed SOURCE RUN OUT                       features to Parquet; then:
  raysl search OUT --query FILE --grid grid.png    the images nearest to FILE
  raysl duplicates OUT --contact-sheet dup.png     near-duplicates, and which to drop
  raysl export RUN --format onnx                   the encoder in another format, checked
  raysl import CHECKPOINT                          an encoder from other training code

CONFIG is a YAML file, or the name of a shipped configuration. On a cluster, run it as a job:
  ray job submit --working-dir . -- python pipelines/pretrain.py CONFIG [overrides]

The same command resumes a stopped run. Compare runs in MLflow's UI:
  mlflow ui --backend-store-uri sqlite:///mlflow.db
"""

# Verbs that train, by default on a Ray of their own.
_ON_RAY = ("pretrain", "finetune", "distill", "sweep")

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
# Printed after Ctrl-C, for verbs that can resume.
_RESUME_HINTS = {
    "pretrain": "; the same command resumes from its last checkpoint, if it has one",
    "finetune": "; the same command resumes from its last checkpoint, if it has one",
    "distill": "; the same command resumes from its last checkpoint, if it has one",
    "pipeline": "; the same command resumes and keeps finished steps",
    "sweep": "; the same command resumes and keeps finished trials",
    "evaluate": "; the same command resumes and keeps finished measurements",
    "pack": "; the same command resumes with the missing shards",
    "embed": "; the same command resumes with the missing shards",
}


_LONGEST_VERB_WORDS = 2  # words of the longest verb, such as "benchmark input"


def let_waiting_threads_sleep() -> None:
    """Set the environment so that waiting torch threads sleep, unless the user has set it.

    Call this before torch is imported. Spinning threads occupy the cores that data workers need: 65
    instead of 245 images/s on two busy cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Spin briefly before sleeping: bfloat16 on CPU waits so often that it would be 50 times slower
    # (ADR 5).
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments after the program's name; None uses those of the process.

    Returns:
        The exit status: 0 after success, 1 after a ``RayslError`` (printed without a traceback),
        2 for invalid arguments, 130 after Ctrl-C, 143 after SIGTERM.
    """
    let_waiting_threads_sleep()
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _early_server(arguments):
        return _run(arguments)


def _early_server(arguments: list[str]) -> AbstractContextManager[None]:
    """Start the fork server of a verb that trains before its module loads, which takes seconds."""
    if arguments[:1] and arguments[0] in _ON_RAY:
        from raysl.run.early import early_server_for  # noqa: PLC0415 - not for every verb

        return early_server_for(arguments)
    return nullcontext()


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="raysl", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb_parser: argparse.ArgumentParser | None = None
    for verb, text in VERBS.items():
        subparser = verbs.add_parser(verb, help=text, description=f"raysl {verb}: {text}")
        if arguments[:1] == [verb]:  # load only this verb, so that --help is fast
            module = importlib.import_module(_module_of(verb))
            module.add_arguments(subparser)
            verb_parser = subparser
    parsed = _parse(parser, verb_parser, arguments)
    try:
        with sigterm_raises():
            status: int = importlib.import_module(_module_of(parsed.verb)).run(parsed)
    except RayslError as error:
        sys.stderr.write(f"raysl {parsed.verb}: {type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt as error:
        when = f" {error}" if str(error) else ""
        hint = _RESUME_HINTS.get(parsed.verb, "")
        sys.stderr.write(f"raysl {parsed.verb}: stopped{when}{hint}\n")
        return _TERMINATED if isinstance(error, Terminated) else _INTERRUPTED
    return status


def _module_of(verb: str) -> str:
    return _MODULES.get(verb, f"raysl.{verb}.command")


def _parse(
    parser: argparse.ArgumentParser,
    verb_parser: argparse.ArgumentParser | None,
    arguments: list[str],
) -> argparse.Namespace:
    """Parse arguments, with overrides before or after options."""
    if verb_parser is not None:
        with suppress(TypeError):  # argparse cannot intermix them if the verb has subcommands
            parsed = verb_parser.parse_intermixed_args(arguments[1:])
            parsed.verb = arguments[0]
            return parsed
        first = next((n for n, word in enumerate(arguments) if word.startswith("-")), None)
        if first is not None and first > _LONGEST_VERB_WORDS:  # else overrides come last
            overrides = [word for word in arguments[first:] if _OVERRIDE.match(word)]
            rest = [word for word in arguments[first:] if not _OVERRIDE.match(word)]
            arguments = [*arguments[:first], *overrides, *rest]
    return parser.parse_args(arguments)
