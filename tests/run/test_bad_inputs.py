"""About a thousand bad inputs at the doors that a user uses: each is refused in a clear message.

Tried here: wrong values for every setting, texts that are no configuration, overrides, addresses,
words of the command line, and damaged run folders. tests/sources/test_bad_sources.py has sources,
tests/sweep/test_bad_sweeps.py sweeps and pipelines.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.config.load import models_in
from raysl.config.yaml_text import to_yaml
from raysl.downstream.evaluation_config import load_evaluation
from raysl.encoder.file import load_encoder
from raysl.evaluate.training_source import open_training_source
from raysl.methods import load_method, method_names
from raysl.run.check import check_names, check_start
from raysl.run.from_run import distill_values, finetune_values
from raysl.run.recipe import RunConfig, load_run

Refused = Callable[..., dict[str, str | None]]

DIGITS_23 = "99999999999999999999999"
NEVER = (".nan", ".inf", "-.inf", DIGITS_23, "1e300", "1e-300", '"a\\0b"')
VALUES = ("abc", "[]", "{}", "-1", "0", "1e-7", "[1, 2]", "''", "1.5", "{a: 1}", *NEVER)

BASE = """\
data: {source: digits}
method: {name: simclr}
train: {steps: 5, global_batch_size: 32}
"""
TEXTS = {
    "list": "- a\n- b", "scalar": "5", "words": "hello", "tab": "a:\n\t- b", "open list": "a: [1",
    "open map": "a: {b: 1", "repeated": BASE + "seed: 1\nseed: 2\n", "unknown alias": "a: *x",
    "holds itself": "a: &x\n  b: *x\n", "binary": "\x00\x01\x02", "two": BASE + "---\n" + BASE,
    "python object": "a: !!python/object:os.system x", "own tag": "a: !foo bar",
    "number key": BASE + "1: 2\n", "null key": BASE + "null: 2\n", "list key": "? [1]\n: 2\n",
    "map key": "? {a: 1}\n: 2\n", "date": BASE + "seed: 2020-01-01\n",
    "no date": BASE + "seed: 2020-13-45\n", "no day": BASE + "name: 2001-02-30t21:59:43\n",
    "deep lists": "a: " + "[" * 3000, "deep maps": "{" * 3000,
    "deep lines": "".join(" " * depth + "a:\n" for depth in range(500)),
    "unfolds": "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)
    ),
    "extends itself": "extends: extends itself.yaml\n",
    "extends nothing": "extends: nothing.yaml\n",
    "extends two": "extends: [a, b]\n", "extends a folder": "extends: .\n",
    "extends a number": "extends: 3\n", "extends no text": "extends: ''\n",
    "method as text": "data: {source: digits}\nmethod: simclr\ntrain: {steps: 3}\n",
    "method as list": "data: {source: digits}\nmethod: [simclr]\ntrain: {steps: 3}\n",
    "method null": "data: {source: digits}\nmethod:\ntrain: {steps: 3}\n",
    "data as text": "data: digits\nmethod: {name: simclr}\ntrain: {steps: 3}\n",
    "no method": "data: {source: digits}\ntrain: {steps: 3}\n",
    "no data": "method: {name: simclr}\ntrain: {steps: 3}\n",
    "no train": "data: {source: digits}\nmethod: {name: simclr}\n", "empty": "", "null": "null",
    "merge of a number": "<<: 5\n" + BASE, "base 16": BASE + "seed: 0x_\n",
    "base 60": BASE + "seed: 1:30\n", "base 8": BASE + "seed: 010\n",
    "5,000 digits": BASE + "seed: " + "9" * 5000 + "\n", "hex": BASE + "seed: 0x" + "f" * 6000,
    "400 digits": BASE + "seed: " + "9" * 400 + ".0\n", "infinite": BASE + "seed: 1e9999999\n",
    "no int": "a: !!int x", "no float": "a: !!float x", "no bool": "a: !!bool x",
    "no time": "a: !!timestamp x", "no base 64": "a: !!binary '%%%'", "no set": "a: !!set 5",
    "no pairs": "a: !!pairs 5", "no map": "a: !!map 5", "no omap": "a: !!omap [b]",
    "name up": BASE + "name: ../../etc\n", "name empty": BASE + "name: ''\n",
    "name hidden": BASE + "name: .a\n", "name of two": BASE + "name: 'a b'\n",
    "name long": BASE + f"name: {'a' * 5000}\n", "nul": BASE + 'output_dir: "a\\0b"\n',
    "half a character": BASE + 'output_dir: "\\ud800"\n', "no version": "%YAML 9.9\n---\na: 1",
    "source nul": BASE.replace("digits", '"a\\0b"'), "source empty": BASE.replace("digits", "''"),
    "source list": BASE.replace("digits", "[digits]"),
    "source null": BASE.replace("digits", "null"),
}  # fmt: skip
BYTES = {
    "latin": b"a: \xff\xfe\n", "utf-16": BASE.encode("utf-16"), "gzip": b"\x1f\x8b\x08\x00aaaa",
    "large": b"a: 1\n" * 300_000,
}  # fmt: skip

# Each on top of RUN of tests/conftest.py, with MLflow.
OVERRIDES = """\
|=|=1|a|a=|a.b|a..b=1|.a=1|a.=1|optim=5|optim=abc|optim=[1]|optim.base_lr.x=1|optim.base_lr=
optim.base_lr=[|optim.base_lr={|optim.base_lr=*a|data.views.kinds.9.size_px=32
data.views.kinds.x.size_px=3|data.views.kinds.-1.size_px=3|data.views.kinds=[]|data.views.kinds=5
data.views.kinds.0=null|data.views.kinds.0.ops.7.op=x|data.views.kinds.0.ops.0.op=nothing
data.views.recipe=nothing|data.views=simclr|data.views={}|data.views=[]
data.views.kinds.0.count=100000|data.views.kinds.0.count=0|data.views.kinds.0.size_px=100000
data.views.kinds.0.size_px=1000000000000|data.views.kinds.0.crop.scale=[1, 0]
data.views.kinds.0.crop.scale=[0, 0]|data.views.kinds.0.crop.ratio=[2, 1]
data.views.kinds.0.crop=5|method.name=|method.name=5|method.name=simclrr|method.name=os.path
method.name=..|method.name=raysl.methods.base|method.name=json|method.name={}|method=simclr
method=moco|method.memory_length=100|method.temperature=0|method.temperature=-1
method.projection_dim=1000000000|train.steps=0|train.steps=1000000000000000000|train.steps=-5
train.steps=1.5|train.epochs=1|train.epochs=0|train.global_batch_size=1
train.global_batch_size=1000000|train.micro_batch_size=7|train.micro_batch_size=1
train.micro_batch_size=1000|train.checkpoint_every=5|train.checkpoint_every={}
train.checkpoint_every={steps: 1, epochs: 1}|train.checkpoint_every={steps: -1}
train.checkpoint_every={fraction: 2}|train.checkpoint_every={hours: 2}
train.checkpoint_every={steps: 0}|train.checkpoint_every={epochs: 0}|evaluate.every={steps: 0}
evaluate.every={fraction: 0}|optim.warmup={epochs: 1000}|optim.warmup={steps: 1000}
optim.warmup={steps: 7}|optim.layer_decay=0|optim.name=adam|optim.schedule=linear
backbone.width=1e-7|backbone.width=1e7|backbone.width=0|backbone.name=resnet|backbone.name=
backbone.name=torchvision/nothing|backbone.name=timm/nothing|backbone.name=torchvision:nothing
backbone.weights=nothing|backbone.weights=run.yaml|backbone.weights=.
backbone.batch_norm_splits=7|backbone.patch_size_px=7|backbone.num_heads=7|backbone.depth=0
seed=-1|seed=9223372036854775808|seed=1.5|seed=true|name=a/b|name=.|name=..|name=|name=a b|name=5
output_dir=null|output_dir=5|cluster.num_train_workers=-1|cluster.num_train_workers=1000000
cluster.num_train_workers=5|cluster.device=tpu|cluster.device=cuda:9
cluster.cpus_per_train_worker=0|cluster.threads_per_train_worker=0
cluster.threads_per_train_worker=1000000|cluster.num_data_workers=0
cluster.prefetch_batches=1000000000|cluster.max_failures=-1|track.experiment=''
track.registered_model=''|track.tracking_uri=''|track.mlflow=5|evaluate.final=[nothing]
evaluate.final=5|evaluate.source=nothing|evaluate.max_train_images=0|evaluate.crop_fraction=0
evaluate.crop_fraction=1e-7|evaluate.knn.k=0|evaluate.online=background|data.source=nothing
data.source=.|data.source=run.yaml|data.source=s3://|data.source=foo://x|data.source=~nobody/x
data.source=file:///nothing|data.source=cifar11|data.source=imagenet|data.limit=0|data.limit=-5
data.limit=5|data.mean=[1, 2]|data.std=[0, 0, 0]|data.std=[1, 1]|data.std=[-1, 1, 1]|data.mean=5
data.split=nothing|data.labels=some|data.labels.fraction=2|data.mix=[{weight: 1}]
data.mix=[{source: nothing, weight: 1}]|data.mix=[{source: digits, weight: 0}]|data.filter=x
data.bad_images.max_share=2|data.bad_images.policy=x|data.color_on=gpu|data.intensity=x
data.pages=x|health.patience=0|health.min_feature_std=-1|health.min_feature_std=2
health.check_ranks=0|health.check_ranks=all|method={name: swav, sinkhorn_iterations: 1000000000}
method={name: ebm, langevin_steps: 1000000000}|method={name: moco, queue_length: 5}
method={name: moco, queue_length: 100000}|method={name: mae}|method={name: jigsaw, grid: 0}
method={name: jigsaw, grid: 100}|method={name: dino, num_prototypes: 0}
method={name: distill}|method={name: distill, teacher: nothing}|method={name: byol, hidden_dim: 0}
method={name: context_encoder, bottleneck_dim: 0}|method={name: nce, num_noise: 0}"""

ADDRESSES = """\
foo://x|htp://x|http://|http://[::1|http://a:b|http://a:99999|http://u:secret@h:b|s3://x
http://u:secret@a b/|https://"""

WORDS = """\
|nothing|pretrain|pretrain --nothing|pretrain nothing|pretrain run.yaml --fresh --extend
pretrain run.yaml a|pretrain . |config nothing|config run.yaml --list --reference x|config
sweep|sweep nothing|sweep run.yaml|sweep .|pipeline|pipeline nothing|pipeline run.yaml|finetune
finetune nothing|finetune .|finetune run.yaml|distill|distill nothing|distill .|evaluate
evaluate nothing|evaluate resnet18|evaluate resnet18 data.source=nothing|evaluate . data.source=.
embed|embed nothing nothing out|embed digits nothing out|search|search nothing|search nothing -k x
search nothing --query nothing|duplicates|duplicates nothing|export|export nothing --format onnx
export . --format onnx|export run.yaml --format nothing|import|import nothing|import run.yaml
import .|pack|pack nothing|pack nothing out|pack digits|pack . out|data|data nothing|data run.yaml
benchmark|benchmark nothing|benchmark input|benchmark input nothing|benchmark loss -n x
benchmark plan nothing|benchmark embed"""


def split(cases: str) -> list[str]:
    return [case for line in cases.splitlines() for case in line.split("|")]


@pytest.fixture
def start(run_yaml: Callable[[str], Path]) -> Callable[[list[str]], None]:
    """Do everything of `raysl config run.yaml OVERRIDES` but the printing."""
    path = run_yaml("run")
    text = path.read_text().replace("mlflow: false", "mlflow: true")
    path.write_text(text)

    def start(overrides: list[str]) -> None:
        config = load_run(path, overrides)
        check_names(config)
        check_start(config, open_training_source(config.data, config.evaluate, config.method))

    return start


def keys_of(model: Any, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if prefix + name not in ("data.views", "method"):  # their kinds are tried by name
            for section in models_in(field.annotation)[:1]:
                yield from keys_of(section, f"{prefix}{name}.")


def settings() -> Iterator[tuple[list[str], str]]:
    """Yield every setting of a run and of every method, and what comes before it."""
    yield from (([], key) for key in keys_of(RunConfig))
    for method in method_names():
        names = set(load_method(method).Config.model_fields) - {"name"}
        yield from (([f"method={{name: {method}}}"], f"method.{name}") for name in sorted(names))


def test_every_setting_refuses_what_it_cannot_be(
    run_yaml: Callable[[str], Path], refused: Refused
) -> None:
    """Each gets three of the values, in turns; what is no number or no text is never taken."""
    path = run_yaml("run")
    cases = {}
    for number, (before, key) in enumerate(settings()):
        values = [VALUES[(3 * number + turn) % len(VALUES)] for turn in range(3)]
        for value in values:
            given = [*before, f"{key}={value}"]
            cases[" ".join(given)] = (given, [key.rpartition(".")[2], key.partition(".")[0]])
    found = refused(lambda overrides: load_run(path, overrides), cases)
    assert len(found) > 700
    taken = [name for name, text in found.items() if text is None]
    assert [name for name in taken if name.endswith(NEVER)] == []
    assert len(taken) < len(found) / 5


def test_texts_that_are_no_configuration(tmp_path: Path, refused: Refused) -> None:
    cases = {}
    texts = {name: text.encode("utf-8", "surrogatepass") for name, text in TEXTS.items()}
    for name, content in (texts | BYTES).items():
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(content)
        cases[name] = (path, [name])
    cases |= {"a folder": (tmp_path, [tmp_path.name]), "none": (tmp_path / "x.yaml", ["x.yaml"])}
    found = refused(load_run, cases)
    assert [name for name, text in found.items() if text is None] == []
    assert "extends nothing.yaml: extends: " in str(found["extends nothing"])


def test_overrides_that_make_no_sense(start: Callable[[list[str]], None], refused: Refused) -> None:
    cases = {}
    for override in split(OVERRIDES):
        key = override.partition("=")[0]
        section = key.partition(".")[0] or "override"
        cases[override] = ([override], [section, "override", "train.global_batch_size"])
        if key == "method":
            cases[override] = ([override], ["method", "views", "ViT", "teacher"])
    found = refused(start, cases)
    assert [name for name, text in found.items() if text is None] == []


def test_addresses_that_are_none(start: Callable[[list[str]], None], refused: Refused) -> None:
    cases = {
        address: ([f"track.tracking_uri={json.dumps(address)}"], ["track.tracking_uri"])
        for address in split(ADDRESSES)
    }
    found = refused(start, cases)
    assert [name for name, text in found.items() if text is None] == []
    assert not any("secret" in str(text) for text in found.values())


def test_words_of_the_command_line(
    run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A status that is not 0 and a message on the error output, never a traceback."""
    run_yaml("run")
    wrong = []
    for line in split(WORDS):
        try:
            status = main(line.split())
        except SystemExit as end:  # as argparse ends
            status = int(end.code or 0)
        except Exception as error:
            wrong.append(f"{line}: {error!r}")
            continue
        if status not in (1, 2) or not capsys.readouterr().err.strip():
            wrong.append(f"{line}: status {status}")
    assert not wrong, "\n".join(wrong)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2], "empty": lambda _: b"",
    "words": lambda _: b"hello", "length": lambda content: b"\xff" * 8 + content[8:],
    "header": lambda content: content[:8] + b"x" * 50 + content[58:],
    "zeros": lambda content: bytes(len(content)), "a list": lambda _: b"[]",
    "a number": lambda _: b"5", "null": lambda _: b"null", "NaN": lambda _: b'{"a": NaN}',
    "no text": lambda _: b"\xff\xfe\x00", "deep": lambda _: b"[" * 5000, "no keys": lambda _: b"{}",
    "other kinds": lambda _: b'{"run_id": 5, "steps": "x", "run_dir": [], "sent": 3, "key": 7}',
}  # fmt: skip
NEEDS: dict[str, tuple[str, ...]] = {
    "fine-tune": ("config.yaml", "projection_head.safetensors"),
    "evaluate": ("config.yaml", "encoder.safetensors", "mlflow.json"),
    "distill": ("config.yaml", "classifier.safetensors"),
    "load": ("encoder.safetensors",),
}


def test_run_folders_that_are_damaged(
    run_yaml: Callable[[str], Path], tiny_encoder: Callable[..., Path], refused: Refused
) -> None:
    """What a command needs of the folder is named, or it is of no account to it."""
    whole = tiny_encoder("whole").parent
    config = load_run(run_yaml("run")).model_dump(mode="json")
    (whole / "config.yaml").write_text(to_yaml(config))
    words = ["data.source=digits", "features.size_px=0"]
    doors: dict[str, Callable[[Path], object]] = {
        "fine-tune": finetune_values,
        "evaluate": lambda folder: load_evaluation(str(folder), words, home=whole.parent),
        "distill": distill_values,
        "load": load_encoder,
    }
    for verb, door in doors.items():
        cases = {}
        for file in NEEDS[verb]:
            for kind, damage in DAMAGE.items():
                folder = whole.with_name(f"{verb} {file} {kind}")
                shutil.copytree(whole, folder)
                exists = (folder / file).exists()
                content = (folder / file if exists else whole / "encoder.safetensors").read_bytes()
                (folder / file).write_bytes(damage(content))
                cases[folder.name] = (folder, [file, folder.name, "features.size_px"])
        found = refused(door, cases)
        taken = [name for name, text in found.items() if text is None]
        assert taken == [] or verb == "fine-tune"  # which reads the weights at its start
