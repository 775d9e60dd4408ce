"""What a run is told of its precision before it starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.run import build
from raysl.run.recipe import load_run


@pytest.mark.parametrize(
    ("precision", "use_gpu", "slowdown", "is_told"),
    [
        ("bf16", False, 60.0, True),
        ("bf16", False, 0.5, False),  # a CPU with instructions for it
        ("bf16", True, 60.0, False),
        ("fp32", False, 60.0, False),
        ("by_device", False, 60.0, False),
    ],
)
def test_a_precision_that_the_cpu_emulates_is_told(
    run_yaml: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    use_gpu: bool,
    slowdown: float,
    is_told: bool,
) -> None:
    monkeypatch.setattr(build, "bf16_slowdown_on_cpu", lambda: slowdown)
    config = load_run(run_yaml("r"), [f"train.precision={precision}"])
    note = build.precision_note(config, use_gpu=use_gpu)
    assert (note is not None) == is_told
    if note is not None:
        assert "60 times" in note
        assert "train.precision=fp32" in note
