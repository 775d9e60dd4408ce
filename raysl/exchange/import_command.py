"""`raysl import`: convert a checkpoint of other training code to an encoder file of raysl."""

import argparse
from pathlib import Path

from raysl.config.help_text import settings_text
from raysl.config.load import apply_overrides, validate
from raysl.encoder.layouts import LAYOUTS
from raysl.errors import ConfigError
from raysl.exchange.import_encoder import ImportConfig, Imported, import_encoder
from raysl.folder.address import is_address, path_or_address
from raysl.report.terminal import console, mapping_table, print_json, say
from raysl.run.shell import command

_EPILOG = """\
The layouts, which are recognised automatically:
{layouts}

The settings:
{settings}

The backbone is recognised by the names and shapes of the tensors, and by files beside the weights:
config.json of transformers or timm, args.json of solo-learn. If they do not tell the normalisation,
the pooling, the attention heads, the stem or which network to import, a value is assumed and
printed, with the setting that changes it. No code from the file is run; optimizers, options and
other networks are left out.

  raysl import moco_v2_800ep_pretrain.pth.tar
  raysl import dino_deitsmall16_pretrain_full_checkpoint.pth -o dino.safetensors
  raysl import last.ckpt backbone.stem=small image_size_px=64 mean=[0,0,0] std=[1,1,1]
  raysl import checkpoint.pth network=student/module.backbone.
  raysl import folder/of/save_pretrained
  raysl pretrain CONFIG backbone.weights=checkpoint.pth      reads the same layouts directly
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    layouts = "\n".join(f"  {layout.name:<13} {layout.origin}" for layout in LAYOUTS)
    parser.epilog = _EPILOG.format(layouts=layouts, settings=settings_text(ImportConfig))
    parser.add_argument(
        "file", type=path_or_address, help="a weight file, or a Hugging Face folder"
    )
    parser.add_argument("overrides", nargs="*", help="settings as key=value, with YAML values")
    parser.add_argument(
        "--layout",
        default="auto",
        choices=("auto", *(layout.name for layout in LAYOUTS)),
        metavar="NAME",
        help="layout of the file, by the training code that wrote it (default auto)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.safetensors",
        help="file to write, or a folder for encoder.safetensors (default: "
        "FILE.encoder.safetensors beside the file)",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Convert a weight file to an encoder file; print what was recognised and assumed."""
    if is_address(arguments.file):
        raise ConfigError(
            f"{arguments.file}: raysl import reads files of this machine; copy it here first. A "
            f"run can start from the address itself: backbone.weights={arguments.file}"
        )
    values = apply_overrides({}, arguments.overrides)
    config = validate(ImportConfig, values, where="raysl import")
    output = _output(arguments.file, arguments.output)
    imported = import_encoder(arguments.file, config, output, layout=arguments.layout)
    _say(imported, output)
    if arguments.json:
        values = {**imported._asdict(), "backbone": imported.backbone.model_dump(mode="json")}
        print_json({"encoder": str(output), **values})
    return 0


def _output(file: Path, output: Path | None) -> Path:
    """Return the absolute path of the encoder file to write.

    Raises:
        ConfigError: If it is the weight file itself, or has another suffix.
    """
    file = file if file.name else file.absolute()  # "." has no name to put another beside
    output = output or file.with_name(f"{file.name.partition('.')[0]}.encoder.safetensors")
    if output.is_dir() or not output.suffix:
        output /= "encoder.safetensors"
    if output.suffix != ".safetensors":
        raise ConfigError(f"-o {output}: give a folder, or a name that ends with .safetensors")
    if output.absolute() == file.absolute():
        raise ConfigError(f"-o {output} is the file to import; give another path")
    return output.absolute()


def _say(imported: Imported, output: Path) -> None:
    changed = imported.backbone.model_dump(mode="json", exclude_defaults=True)
    summary = {
        "layout": f"{imported.layout}: {imported.whose}",
        "network": imported.taken,
        "backbone": ", ".join(f"{key}={value}" for key, value in changed.items()) or "resnet50",
        "features": f"{imported.embed_dim:,} per image",
        "images": f"{imported.image_size_px} px, mean {_numbers(imported.mean)}, standard "
        f"deviation {_numbers(imported.std)}",
    }
    if imported.told:
        summary["metadata"] = imported.told
    for number, assumption in enumerate(imported.guessed):
        # The rows of a table have different names: the later ones are blanks.
        summary["assumed" if number == 0 else " " * number] = assumption
    out = console()
    out.print(mapping_table(f"imported to {output}", summary))
    if imported.guessed:
        say("to change an assumption: raysl import FILE SETTING=VALUE")
    say(
        "no code from the file was run; the features of random images are finite, and the encoder "
        "file gives the same features"
    )
    out.print(f"next      {command('evaluate', output, 'data.source=digits')}", markup=False)
    out.print(f"photos    {command('evaluate', output, 'data.source=FOLDER')}", markup=False)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
