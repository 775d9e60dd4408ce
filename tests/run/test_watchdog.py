"""A step that does not end: who hangs, what is written, and what does not count as hanging."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.errors import HungError
from raysl.run.notes import FolderNotes
from raysl.run.stop import ends_when_hung
from raysl.run.watchdog import OnHang, Watchdog, watch
from raysl.track.events import last_hang
from raysl.track.run_folder import RunFolder, read_metrics
from raysl.track.step_note import read_step_note
from raysl.train.loop import FIRST_BATCH

SOON_S = 10.0


class Rank:
    """A rank whose loop does something in a thread, under a watchdog."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        *,
        limit_s: float = 0.2,
        notes: FolderNotes | None = None,
    ) -> None:
        self.ended: list[str] = []
        self.told: list[tuple[int, str]] = []
        self.has_ended = threading.Event()
        self.watchdog = Watchdog(
            folder,
            shown=str(folder),
            notes=notes or FolderNotes(folder),
            **{"rank": rank, "size": size, "limit_s": limit_s},  # type: ignore[arg-type]
            end=self.end,
            tell=lambda step, text: self.told.append((step, text)),
        )

    def end(self, text: str) -> None:
        self.ended.append(text)
        self.has_ended.set()

    def run(self, loop: Callable[["Rank"], None]) -> threading.Thread:
        def work() -> None:
            with self.watchdog:
                loop(self)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread


def hangs(rank: Rank) -> None:
    rank.watchdog(41, FIRST_BATCH)
    rank.watchdog(42, "training")
    rank.has_ended.wait(SOON_S)


class TestOneWorker:
    def test_that_hangs_is_named_with_its_step_its_place_and_its_stacks(
        self, tmp_path: Path
    ) -> None:
        rank = Rank(tmp_path / "stacks", 0, 1)
        rank.run(hangs).join(SOON_S)
        (text,) = rank.ended
        assert rank.told == [(42, text)]
        assert text.startswith("the train worker hangs: no progress for 0 s (health.max_step_s=0.2")
        assert "worker 0: step 42, training, at " in text
        assert text.endswith(f"The stacks of all threads are in {tmp_path}/stacks")
        assert "in hangs" in (tmp_path / "stacks" / "rank0.txt").read_text()

    @pytest.mark.parametrize("what", ["waiting for its batch", "evaluating"])
    def test_hangs_in_any_phase_but_the_first(self, tmp_path: Path, what: str) -> None:
        def loop(rank: Rank) -> None:
            rank.watchdog(1, FIRST_BATCH)
            time.sleep(0.5)  # the cluster may take its time
            assert rank.ended == []
            rank.watchdog(1, what)
            assert rank.has_ended.wait(SOON_S)

        rank = Rank(tmp_path / "stacks", 0, 1)
        rank.run(loop).join(SOON_S)
        assert what in rank.ended[0]

    def test_that_makes_progress_does_not_hang(self, tmp_path: Path) -> None:
        def loop(rank: Rank) -> None:
            for step in range(1, 12):
                rank.watchdog(step, "training")
                time.sleep(0.05)

        rank = Rank(tmp_path / "stacks", 0, 1)
        rank.run(loop).join(SOON_S)
        time.sleep(0.3)  # nor after its end
        assert rank.ended == []
        assert not (tmp_path / "stacks").exists()

    def test_may_take_ten_times_as_long_as_its_longest_step(self, tmp_path: Path) -> None:
        def loop(rank: Rank) -> None:
            for length_s in (0.15, 0.6):
                rank.watchdog(rank.watchdog._phase[0] + 1, "training")
                time.sleep(length_s)
            assert rank.ended == []

        rank = Rank(tmp_path / "stacks", 0, 1)
        thread = rank.run(loop)
        thread.join(SOON_S)
        assert rank.ended == []


class TestTwoWorkers:
    def run(self, tmp_path: Path, *loops: Callable[[Rank], None]) -> list[Rank]:
        ranks = [Rank(tmp_path / "stacks", number, 2) for number in range(len(loops))]
        threads = [rank.run(loop) for rank, loop in zip(ranks, loops, strict=True)]
        for thread in threads:
            thread.join(2 * SOON_S)
        return ranks

    def test_of_which_one_waits_for_the_other_name_the_other(self, tmp_path: Path) -> None:
        namespace: dict[str, Callable[[Rank], None]] = {}
        source = "def waits(rank):\n rank.watchdog(42, 'training')\n rank.has_ended.wait(10)\n"
        exec(compile(source, "/x/torch/distributed/distributed_c10d.py", "exec"), namespace)
        ranks = self.run(tmp_path, namespace["waits"], hangs)
        for rank in ranks:
            text = rank.ended[0]
            assert text.startswith("train worker 1 hangs: no progress")
            assert "worker 0: step 42, training, at " in text
            assert "in wait, where it waits for the other workers; worker 1: step 42, trai" in text
        assert [len(rank.told) for rank in ranks] == [1, 0]

    def test_without_a_common_disk_know_of_each_other(self, tmp_path: Path) -> None:
        notes = FolderNotes(tmp_path / "told")  # on Ray, its key-value store
        ranks = [Rank(tmp_path / str(number), number, 2, notes=notes) for number in range(2)]
        for thread in [rank.run(hangs) for rank in ranks]:
            thread.join(2 * SOON_S)
        for number, rank in enumerate(ranks):
            assert "train workers 0, 1 hang" in rank.ended[0]
            assert "does not run" not in rank.ended[0]
            assert [file.name for file in (tmp_path / str(number)).iterdir()] == [
                f"rank{number}.txt"
            ]

    def test_of_which_one_does_not_run_at_all_name_that(self, tmp_path: Path) -> None:
        (rank,) = self.run(tmp_path, hangs)
        assert rank.ended[0].startswith("train worker 1 hangs")
        assert "worker 1: its process does not run" in rank.ended[0]


def test_the_run_folder_gets_the_step_and_the_hang(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    ended = threading.Event()
    began = time.time()
    watched = watch(folder, start_step=40, limit_s=0.2, on_hang=OnHang(lambda text: ended.set()))
    with watched as doing:
        assert read_step_note(folder.last_step) == 40
        doing(41, FIRST_BATCH)
        time.sleep(0.11)
        doing(42, "training")
        assert read_step_note(folder.last_step) == 41
        assert ended.wait(SOON_S)
    assert (last_hang(folder, since=began) or "").startswith("the train worker hangs")
    assert last_hang(folder, since=time.time() + 1) is None
    assert read_metrics(folder.events)[0]["step"] == 42


class TestEndsWhenHung:
    def test_raises_in_the_main_thread_which_sleeps(self) -> None:
        before = signal.getsignal(signal.SIGUSR2)

        def train() -> None:
            with ends_when_hung() as end:
                threading.Timer(0.1, end, ["it hangs"]).start()
                threading.Event().wait(SOON_S)

        began = time.monotonic()
        with pytest.raises(HungError, match="it hangs"):
            train()
        assert time.monotonic() - began < SOON_S / 2
        signal.signal(signal.SIGUSR2, before)

    def test_ends_the_process_where_that_does_not_help(self, tmp_path: Path) -> None:
        """As with a pool of threads, whose end waits for the one that hangs."""
        script = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from raysl.run import stop
stop._UNWINDING_S = 0.3
with stop.ends_when_hung() as end, ThreadPoolExecutor(1) as pool:
    future = pool.submit(time.sleep, 60)
    threading.Timer(0.2, end, ["it hangs"]).start()
    future.result()
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
        )
        assert done.returncode == 1
        assert done.stderr == "\nraysl: HungError: it hangs\n"

    def test_leaves_the_signal_as_it_was(self) -> None:
        before = signal.getsignal(signal.SIGUSR2)
        with ends_when_hung():
            assert signal.getsignal(signal.SIGUSR2) is not before
        assert signal.getsignal(signal.SIGUSR2) is before
