import itertools
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import validate
from raysl.sweep.config import SweepConfig
from raysl.sweep.page import draw_sweep
from raysl.sweep.summary import summarise
from raysl.sweep.trial import SweepFolder

T, BATCH, QUEUE = "method.temperature", "train.global_batch_size", "method.queue_length"
ALL = {"curves", "heat_map", "importance", "parameters"}
EVIL = "<script>alert(1)</script>\"'&"


def make_sweep(**more: Any) -> SweepConfig:
    space = {T: {"grid": [0.1, 0.2]}, BATCH: {"grid": [64, 128]}, QUEUE: {"grid": [1024, 4096]}}
    values = {"name": "a-sweep", "base": "a.yaml", "space": space, **more}
    return validate(SweepConfig, values, where="test")


@pytest.fixture
def trials(make_trial: Any) -> list[Any]:
    """Eight trials: two of them were stopped and one failed."""
    places = itertools.product([0.1, 0.2], [64, 128], [1024, 4096])
    made = [
        make_trial(n, {T: t, BATCH: batch, QUEUE: queue}, [0.2 + t, 0.3 + 2 * t + batch / 1000])
        for n, (t, batch, queue) in enumerate(places)
    ]
    for number in (0, 3):
        cut = made[number].curve[:1]
        made[number] = made[number]._replace(
            status="stopped", curve=cut, metric=cut[-1][1], epoch=1.0
        )
    made[2] = made[2]._replace(status="failed", error="DivergedError: train/loss is nan at step 7")
    return made


@pytest.fixture
def draw(tmp_path: Path) -> Any:
    """Draw a sweep; return the page, and what could not be drawn."""
    folder = SweepFolder(tmp_path / "a-sweep")

    def run(
        trials: list[Any], sweep: SweepConfig | None = None, line: str | None = "raysl pretrain x"
    ) -> tuple[str, list[tuple[str, str]]]:
        sweep = sweep or make_sweep()
        summary = summarise(trials, sweep.metric)
        failures = draw_sweep(folder, sweep, trials, summary, next_line=line)
        page = folder.report.read_text() if folder.report.is_file() else ""
        return page, failures

    run.folder = folder  # type: ignore[attr-defined]
    return run


class Text(HTMLParser):
    """Reads the text of a page, a space between its parts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.parts.append(data.strip())

    def __str__(self) -> str:
        return " ".join(part for part in self.parts if part)


def text_of(page: str) -> str:
    return str(Text(page[page.index("<main>") :]))


class TestDrawSweep:
    def test_draws_every_picture_and_puts_it_into_the_page(self, draw: Any, trials: Any) -> None:
        page, failures = draw(trials)
        assert failures == []
        assert {path.stem for path in draw.folder.pictures.iterdir()} == ALL
        assert page.count("data:image/png;base64,") == len(ALL)

    def test_a_sweep_that_has_only_begun_has_a_page_too(self, draw: Any, make_trial: Any) -> None:
        waiting = [make_trial(n, {T: n}, [], status="waiting") for n in range(3)]
        page, failures = draw(waiting, line=None)
        assert failures == []
        assert "3 trials: 3 waiting; 0.0 s of training. Nothing was measured yet." in text_of(page)
        assert "<img" not in page
        assert draw(waiting[:0], line=None)[1] == []

    def test_a_picture_that_is_no_longer_drawn_goes(
        self, draw: Any, trials: Any, make_trial: Any
    ) -> None:
        draw(trials)
        draw([make_trial(n, {T: n}, [0.5 + n / 100]) for n in range(3)])
        assert {path.stem for path in draw.folder.pictures.iterdir()} == {"curves", "parameters"}

    def test_one_failure_does_not_lose_the_others(
        self, draw: Any, trials: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ValueError("no ink")

        monkeypatch.setattr("raysl.sweep.page.draw_heat_map", fail)
        page, failures = draw(trials)
        assert failures == [("heat_map", "ValueError: no ink")]
        assert "not drawn (pictures/heat_map.png)" in page
        assert page.count("<img") == len(ALL) - 1

    def test_reports_a_page_that_cannot_be_written(self, draw: Any, trials: Any) -> None:
        draw.folder.report.mkdir(parents=True)
        assert [name for name, _ in draw(trials)[1]] == ["report"]

    def test_works_in_a_thread_of_its_own(self, draw: Any, trials: Any) -> None:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(draw(trials)[1]))
        thread.start()
        thread.join()
        assert results == [[]]


class TestPage:
    def test_opens_with_what_was_tried_and_what_is_best(self, draw: Any, trials: Any) -> None:
        text = text_of(draw(trials)[0])
        assert text.startswith(
            "a-sweep 8 trials: 5 finished, 2 stopped early, 1 failed; 16 min of training. Best: "
            "trial 6, nearest-neighbour accuracy 82.8 % after 2 epochs."
        )

    def test_has_the_best_trials_settings_and_the_line_that_goes_on(
        self, draw: Any, trials: Any
    ) -> None:
        text = text_of(draw(trials, line="raysl pretrain best.yaml train.epochs=90")[0])
        best = text[text.index("Best: trial 6 ") :]
        assert best.startswith(
            f"Best: trial 6 {T} 0.2 {BATCH} 128 {QUEUE} 1,024 raysl pretrain best.yaml "
            "train.epochs=90"
        )

    def test_has_a_row_a_trial_in_their_order_and_marks_the_best(
        self, draw: Any, trials: Any
    ) -> None:
        page, _ = draw(trials)
        table = page[page.index("<h2>All trials") :]
        numbers = re.findall(r"<th scope=row>(\d)<td", table[: table.index("</table>")])
        assert "".join(numbers) == "67451032"
        assert table.count("class=best") == 1
        assert re.search(r"<tr class=best><th scope=row>6<td class=n>82.8<td>finished", table)
        assert "<th scope=row>0<td class=n>30.0<td>stopped early" in table

    def test_says_why_trials_failed(self, draw: Any, trials: Any) -> None:
        text = text_of(draw(trials)[0])
        assert "Failed trials 2 DivergedError: train/loss is nan at step 7" in text

    def test_has_a_column_for_each_further_metric(self, draw: Any, trials: Any) -> None:
        trials[6] = trials[6]._replace(also={"train/effective_rank": 41.5})
        sweep = make_sweep(metric={"also": ["train/effective_rank"]})
        page, _ = draw(trials, sweep)
        assert "Effective rank of features, dimensions" in page
        assert "<td class=n>82.8<td class=n>41.5<td>finished" in page

    def test_has_means_over_seeds_where_there_are_several(self, draw: Any, make_trial: Any) -> None:
        values = {"a": [0.5, 0.7], "b": [0.4, 0.4]}
        trials = [
            make_trial(2 * place + seed, {"config": name, "seed": seed}, [value])
            for place, (name, row) in enumerate(values.items())
            for seed, value in enumerate(row)
        ]
        text = text_of(draw(trials)[0])
        assert "its 2 seeds 60.0 \u00b1 14.1." in text
        assert "\u00b1 seeds a 60.0 14.1 2 b 40.0 0.0 2 Mean and" in text

    def test_has_no_means_over_seeds_where_there_is_one(self, draw: Any, trials: Any) -> None:
        assert "Means over seeds" not in draw(trials)[0]

    def test_says_where_trials_were_compared(self, draw: Any, trials: Any) -> None:
        assert "compared at epoch 1, which all reached" in draw(trials)[0]
        finished = [trial for trial in trials if trial.status == "finished"]
        assert "compared at their end" in draw(finished)[0]

    def test_holds_the_sweep_and_its_files(self, draw: Any, trials: Any) -> None:
        draw.folder.path.mkdir()
        draw.folder.config.touch()
        text = text_of(draw(trials)[0])
        assert "output_dir: runs" in text
        assert "sweep.yaml the sweep, every setting resolved" in text
        assert "optuna" not in text

    def test_asks_the_network_for_nothing(self, draw: Any, trials: Any) -> None:
        page, _ = draw(trials)
        assert not re.search(r"""(src|href|url|action)\s*[=(]\s*['"]?\s*(https?:)?//""", page)
        assert "default-src 'none'" in page

    def test_escapes_names_that_are_code(self, draw: Any, make_trial: Any) -> None:
        trials = [make_trial(n, {EVIL: f"{EVIL}{n}"}, [0.1 * n + 0.1]) for n in range(5)]
        trials.append(make_trial(5, {EVIL: "x"}, [], status="failed", error=EVIL))
        page, failures = draw(trials, make_sweep(metric={"name": EVIL}), line=EVIL)
        assert failures == []
        assert "<script" not in page
        assert text_of(page).count("<script>alert(1)</script>") >= 10
