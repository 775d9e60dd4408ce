"""`raysl import`: convert a checkpoint of other training code to an encoder of raysl."""

import argparse
from pathlib import Path

from raysl.config.help_text import settings_text
from raysl.config.load import apply_overrides, validate
from raysl.encoder.layouts import LAYOUTS
from raysl.errors import ConfigError
from raysl.exchange.import_encoder import ImportConfig, Imported, import_encoder
from raysl.report.terminal import console, mapping_table, print_json, say
from raysl.run.shell import command

_EPILOG = """\
The layouts, which are recognised automatically:
{layouts}

The settings:
{settings}

The backbone is recognised by the names and shapes of the tensors, and by config.json of
transformers or timm and args.json of solo-learn beside the file. What these do not contain
(normalisation, pooling, attention heads, stem, which of two networks) is assumed, and printed with
the setting that changes it. No code from the file is run; optimizers, options and other networks
are left out.

  raysl import moco_v2_800ep_pretrain.pth.tar
  raysl import dino_deitsmall16_pretrain_full_checkpoint.pth -o dino.safetensors
  raysl import last.ckpt backbone.stem=small image_size_px=64 mean=[0,0,0] std=[1,1,1]
  raysl import checkpoint.pth network=student/module.backbone.
  raysl import folder/of/save_pretrained
  raysl pretrain CONFIG backbone.weights=checkpoint.pth      the same layouts, without this verb
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    layouts = "\n".join(f"  {layout.name:<13} {layout.whose}" for layout in LAYOUTS)
    parser.epilog = _EPILOG.format(layouts=layouts, settings=settings_text(ImportConfig))
    parser.add_argument("file", type=Path, help="a weight file, or a Hugging Face folder")
    parser.add_argument("overrides", nargs="*", help="key=value, typed as YAML")
    parser.add_argument(
        "--layout",
        default="auto",
        choices=("auto", *(layout.name for layout in LAYOUTS)),
        metavar="NAME",
        help="training code that wrote it (default auto)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.safetensors",
        help="default: FILE.encoder.safetensors beside the file; a folder gets encoder.safetensors",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Convert a weight file to an encoder file, and print what was recognised and assumed."""
    values = apply_overrides({}, arguments.overrides)
    config = validate(ImportConfig, values, where="raysl import")
    output = _output(arguments.file, arguments.output)
    imported = import_encoder(arguments.file, config, output, layout=arguments.layout)
    _say(imported, output)
    if arguments.json:
        values = {**imported._asdict(), "backbone": imported.backbone.model_dump(mode="json")}
        print_json({"encoder": str(output), **values})
    return 0


def _output(file: Path, given: Path | None) -> Path:
    output = given or file.with_name(f"{file.name.partition('.')[0]}.encoder.safetensors")
    if output.is_dir() or not output.suffix:
        output /= "encoder.safetensors"
    if output.suffix != ".safetensors":
        raise ConfigError(f"-o {output}: give a folder, or a name that ends with .safetensors")
    if output.absolute() == file.absolute():
        raise ConfigError(f"-o {output} is the file itself; give another place")
    return output.absolute()


def _say(imported: Imported, output: Path) -> None:
    changed = imported.backbone.model_dump(mode="json", exclude_defaults=True)
    shown = {
        "layout": f"{imported.layout}: {imported.whose}",
        "taken": imported.taken,
        "backbone": ", ".join(f"{key}={value}" for key, value in changed.items()) or "resnet50",
        "features": f"{imported.embed_dim:,}",
        "images": f"{imported.image_size_px} px, mean {_numbers(imported.mean)}, deviation "
        f"{_numbers(imported.std)}",
    }
    if imported.told:
        shown["metadata"] = imported.told
    for number, guess in enumerate(imported.guessed):
        shown["assumed" if number == 0 else " " * number] = guess
    out = console()
    out.print(mapping_table(f"imported to {output}", shown))
    if imported.guessed:
        say("to set one of these otherwise: raysl import FILE SETTING=VALUE")
    say("nothing in the file was run; its features are finite and the same after loading again")
    out.print(f"next      {command('evaluate', output, 'data.source=digits')}", markup=False)
    out.print(f"photos    {command('evaluate', output, 'data.source=FOLDER')}", markup=False)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
