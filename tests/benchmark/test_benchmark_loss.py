"""`raysl benchmark loss`: that both forms are one loss, and what is said where one does not fit."""

import json
from typing import Any

import pytest
import torch

from raysl.benchmark.loss import (
    FORMS,
    PLAIN_MATRICES,
    LossCost,
    measure,
    measure_in_own_process,
    needed_bytes,
)
from raysl.benchmark.loss_command import summarise
from raysl.cli import main


def test_both_forms_are_the_same_loss_with_the_same_gradient() -> None:
    found = []
    for form in FORMS.values():
        torch.manual_seed(0)
        z0, z1 = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
        loss = form(z0, z1, temperature=0.1)
        found.append([loss, *torch.autograd.grad(loss, [z0, z1])])
    for plain, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_measures_time_and_memory(form: str) -> None:
    cost = measure(form, 32, 8)
    assert (cost.form, cost.batch_size, cost.dim, cost.problem) == (form, 32, 8, None)
    assert cost.ms is not None
    assert cost.ms > 0
    assert cost.peak_bytes is not None
    assert cost.peak_bytes >= 0


def test_a_case_that_does_not_fit_is_told_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysl.benchmark.loss.free_bytes", lambda: 4 << 30)
    found = measure_in_own_process("plain", 32768, 128)
    assert found["problem"] == "not run: needs 48 GiB, 4 GiB are free"
    assert found["ms"] is None
    assert found["peak_bytes"] is None


def test_the_plain_form_needs_three_matrices_and_the_tiled_one_none() -> None:
    matrix = 4 * (2 * 32768) ** 2
    assert needed_bytes("plain", 32768, 128) > PLAIN_MATRICES * matrix
    assert needed_bytes("tiled", 32768, 128) < matrix / 16
    grown = needed_bytes("tiled", 65536, 128) - needed_bytes("tiled", 32768, 128)
    assert grown == needed_bytes("tiled", 32768, 128) - (256 << 20)  # linear


def test_the_summary_is_the_median_time_and_the_largest_memory() -> None:
    def case(ms: float | None, peak: int | None, problem: str | None = None) -> dict[str, Any]:
        given = {"ms": ms, "peak_bytes": peak, "problem": problem}
        return {"form": "plain", "batch_size": 4, "dim": 2} | given

    found = summarise([case(3.0, 10), case(1.0, 30), case(2.0, 20), case(None, None, "no")])
    assert (found["ms"], found["min_ms"], found["max_ms"]) == (2.0, 1.0, 3.0)
    assert (found["peak_bytes"], found["num_repeats"], found["problem"]) == (30, 3, None)
    assert summarise([case(None, None, "no")])["problem"] == "no"


def test_is_measured_in_a_process_of_its_own() -> None:
    found = measure_in_own_process("tiled", 8, 4)
    assert found["problem"] is None
    assert found["ms"] > 0


class TestCommand:
    def test_gives_a_row_for_each_form_and_batch(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[str, int]] = []

        def measured(form: str, batch_size: int, dim: int) -> dict[str, Any]:
            asked.append((form, batch_size))
            cost = LossCost(form, batch_size, dim, 30_000.0, 1 << 20)
            if form == "plain" and batch_size > 8:
                cost = LossCost(form, batch_size, dim, None, None, "not run: needs 9 GiB")
            return cost._asdict()

        monkeypatch.setattr("raysl.benchmark.loss_command.measure_in_own_process", measured)
        assert main(["benchmark", "loss", "--batches", "8,99", "--repeats", "2", "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out.splitlines()[-1])
        assert found["dim"] == 128
        cases = [(c["batch_size"], c["form"], c["peak_bytes"]) for c in found["cases"]]
        assert cases == [
            (8, "plain", 1 << 20),
            (8, "tiled", 1 << 20),
            (99, "plain", None),
            (99, "tiled", 1 << 20),
        ]
        assert len(asked) == 4  # what takes half a minute, or does not fit, is not repeated
        assert "not run: needs 9 GiB" in out
        assert "measuring tiled at batch size 8, repeat 1 of 2" in err

    @pytest.mark.parametrize("value", ["0", "x", "8,-1"])
    def test_a_batch_that_is_no_number_above_zero_is_refused(self, value: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["benchmark", "loss", f"--batches={value}"])
