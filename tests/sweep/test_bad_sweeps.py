"""Sweeps and pipelines that make no sense are refused before anything starts, in a clear message.

The other bad inputs: tests/run/test_bad_inputs.py.
"""

import re
from collections.abc import Callable
from pathlib import Path

from raysl.downstream.pipeline import load_pipeline
from raysl.sweep.load import load_sweep

Refused = Callable[..., dict[str, str | None]]

SWEEP = """\
base: run.yaml
space: {method.temperature: {grid: [0.1, 0.2]}}
metric: {name: eval/knn_top1}
budget: {epochs: 1}
search: {name: grid}
"""
# Each replaces its key's line, or is a further line.
LINES = """\
base: nothing.yaml|base: []|base: 5|base: [5]|base: null|base: ''|base: .|base: sweep.yaml
base: '*.nothing'|space: []|space: 5|space: null|space: {method.temperature: {}}
space: {method.temperature: 5}|space: {method.temperature: [1, 2]}
space: {method.temperature: {grid: []}}|space: {method.temperature: {grid: 5}}
space: {method.temperature: {grid: [0.1, 0.1, abc]}}|space: {method.temperature: {grid: [-1]}}
space: {method.temperature: {grid: [.nan]}}|space: {method.temperature: {grid: [1e300]}}
space: {method.temperature: {grid: [0.1], uniform: [0, 1]}}|space: {temperature: {grid: [1]}}
space: {method.temperature: {uniform: [1, 0]}}|space: {method.temperature: {uniform: [0]}}
space: {method.temperature: {log_uniform: [0, 1]}}|space: {method.temperatures: {grid: [1]}}
space: {method.temperature: {log_uniform: [-1, 1]}}|space: {method.name: {grid: [nothing]}}
space: {train.global_batch_size: {uniform: [1, .inf]}}|space: {name: {grid: [a]}}
space: {backbone.width: {grid: [1e-7]}}|space: {5: {grid: [1]}}|space: {a..b: {grid: [1]}}
space: {optim.warmup: {grid: [{epochs: 1000}]}}|space: {train.steps: {grid: [0]}}
metric: {name: nothing}|metric: {name: 5}|metric: eval/knn_top1|metric: {mode: up}
metric: {name: eval/knn_top1, also: 5}
budget: {epochs: 0}|budget: {epochs: -1}|budget: {epochs: .nan}|budget: {trials: 0}
budget: {epochs: 1, trials: -5}|budget: 5|budget: null|search: {name: nothing}
search: grid|search: {name: grid, seed: -1}|search: 5|search: {}
scheduler: {name: nothing}|scheduler: {name: asha, grace_epochs: 0}|scheduler: asha|scheduler: 5
scheduler: {name: asha, reduction_factor: 1}|scheduler: {name: asha, grace_epochs: 100}
set: 5|set: []|set: {nothing: 5}|set: {method.temperature: -1}
set: {method.temperature: 0.3}|set: {train.steps: 99999999999999999999999}|nothing: 5|name: a/b
name: ''|seeds: 5|trials: 5|track: {tracking_uri: ''}|track: 5|resources: 5|final: nothing|final: 5
max_concurrent: 0|repeats: 0"""
SWEEP_OVERRIDES = """\
|=|a|nothing=5|space=5|budget.epochs=x|space.method.temperature=5|space.method.temperature=[
method.temperature=-1|scheduler.name=nothing|search.name=x|set=5|base=nothing"""

PIPELINE = """\
base: run.yaml
finetune:
  - {labels: [0.5], head_layers: [0]}
"""
PIPELINE_LINES = """\
base: nothing.yaml|base: 5|base: []|base: null|pretrain: 5|pretrain: []|set: 5|set: []|name: a/b
finetune: 5|finetune: [5]|finetune: [{labels: []}]|finetune: [{labels: [0]}]
finetune: [{labels: [2]}]|finetune: [{labels: 5}]|finetune: [{labels: [.nan]}]|nothing: 5
finetune: [{labels: [0.5], head_layers: []}]|finetune: [{labels: [0.5], head_layers: [-1]}]
finetune: [{labels: [0.5], start: nothing}]|finetune: [{labels: [0.5], nothing: 5}]
distill: 5|distill: [5]|distill: [{}]|distill: [{name: 5}]|distill: [{name: a, teacher: -1}]
distill: [{name: a, labels: [2]}]|track: 5|name: ''"""


def lines_of(cases: str) -> list[str]:
    return [case for line in cases.splitlines() for case in line.split("|")]


def changed(text: str, line: str) -> str:
    """Return a text with another line for a key."""
    key = line.partition(":")[0]
    kept, inside = [], False
    for each in text.splitlines():
        inside = each.startswith(f"{key}:") or (inside and each.startswith(" "))
        if not inside:
            kept.append(each)
    return "\n".join([*kept, line, ""])


def test_sweeps(run_yaml: Callable[[str], Path], tmp_path: Path, refused: Refused) -> None:
    run_yaml("run")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    load_sweep(tmp_path / "sweep.yaml")
    cases = {}
    for number, line in enumerate(lines_of(LINES)):
        path = tmp_path / f"sweep{number}.yaml"
        path.write_text(changed(SWEEP, line))
        cases[line] = ((path, []), re.findall(r"\w+", line))  # the key, or what is wrong in it
    for override in lines_of(SWEEP_OVERRIDES):
        names = [override.partition("=")[0].partition(".")[0] or "override"]
        cases[override] = ((tmp_path / "sweep.yaml", [override]), names)
    found = refused(lambda given: load_sweep(*given), cases)
    taken = [name for name, text in found.items() if text is None]
    assert taken == [], ", ".join(taken)


def test_pipelines(run_yaml: Callable[[str], Path], tmp_path: Path, refused: Refused) -> None:
    run_yaml("run")
    (tmp_path / "pipe.yaml").write_text(PIPELINE)
    load_pipeline(tmp_path / "pipe.yaml")
    cases = {}
    for number, line in enumerate(lines_of(PIPELINE_LINES)):
        path = tmp_path / f"pipe{number}.yaml"
        path.write_text(changed(PIPELINE, line))
        cases[line] = (path, [line.partition(":")[0]])
    found = refused(load_pipeline, cases)
    # The base is read when the runs are made of it.
    assert [name for name, text in found.items() if text is None] == ["base: nothing.yaml"]
