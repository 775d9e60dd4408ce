import json
import threading
from pathlib import Path

import pytest

from raysl.track.follow import Follower, MetricsReader, Record
from raysl.track.run_folder import MetricsFile, read_metrics
from raysl.track.uri import tracking_uri, without_password


def line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "time": 100.0 + step, **metrics}) + "\n"


def steps(records: list[Record]) -> list[int]:
    return [record["step"] for record in records]


class TestMetricsReader:
    def test_hands_out_nothing_of_a_file_that_is_not_there_yet(self, tmp_path: Path) -> None:
        reader = MetricsReader(tmp_path / "metrics.jsonl")
        assert reader.read() == []
        reader.path.write_text(line(1, loss=2.0))
        assert reader.read() == [{"step": 1, "time": 101.0, "loss": 2.0}]

    def test_hands_out_nothing_twice(self, tmp_path: Path) -> None:
        reader = MetricsReader(tmp_path / "metrics.jsonl")
        file = MetricsFile(reader.path, start_step=0)
        file.log({"loss": 3.0}, step=1)
        assert steps(reader.read()) == [1]
        assert reader.read() == []
        file.log({"loss": 2.0}, step=2)
        file.log({"loss": 1.0}, step=3)
        assert steps(reader.read()) == [2, 3]
        assert reader.read() == []
        file.close()

    def test_waits_for_the_rest_of_a_half_line(self, tmp_path: Path) -> None:
        reader = MetricsReader(tmp_path / "metrics.jsonl")
        second = line(2, loss=1.0)
        reader.path.write_text(line(1, loss=2.0) + second[:12])
        assert steps(reader.read()) == [1]
        reader.path.write_text(line(1, loss=2.0) + second[:-1])
        assert reader.read() == []
        reader.path.write_text(line(1, loss=2.0) + second)
        assert reader.read() == [{"step": 2, "time": 102.0, "loss": 1.0}]

    def test_hands_out_a_repeated_step_only_where_its_value_differs(self, tmp_path: Path) -> None:
        reader = MetricsReader(tmp_path / "metrics.jsonl")
        file = MetricsFile(reader.path, start_step=0)
        for step in range(1, 6):
            file.log({"loss": 1.0, "norm": float("nan"), "train/images_per_s": step}, step=step)
        file.close()
        assert steps(reader.read()) == [1, 2, 3, 4, 5]
        restarted = MetricsFile(reader.path, start_step=2)
        assert reader.read() == []
        for step in (3, 4):
            values = {"loss": 1.0 if step == 3 else 0.5, "norm": float("nan")}
            restarted.log({**values, "train/images_per_s": 9.0}, step=step)
        restarted.close()
        assert [(r["step"], r.get("loss"), len(r)) for r in reader.read()] == [(4, 0.5, 3)]
        # A second restart: step 4 was returned with .5 last, step 5 with 1 by the first file.
        again = MetricsFile(reader.path, start_step=2)
        for step in (3, 4, 5, 6):
            again.log({"loss": 1.0}, step=step)
        again.close()
        assert [(r["step"], r["loss"]) for r in reader.read()] == [(4, 1.0), (6, 1.0)]
        assert reader.read() == []
        reader.close()

    def test_knows_the_repeated_values_of_a_file_that_an_earlier_reader_returned(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(line(step, loss=1.0) for step in (1, 2, 3)))
        reader = MetricsReader(path, {"loss": 2})
        file = MetricsFile(path, start_step=1)
        for step in (2, 3):
            file.log({"loss": step / 2}, step=step)
        file.close()
        assert [(r["step"], r["loss"]) for r in reader.read()] == [(3, 1.0), (3, 1.5)]

    def test_hands_out_only_what_is_written_from_now_on(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(line(step, loss=1.0) for step in (1, 2, 3)))
        reader = MetricsReader(path, only_new=True)
        assert reader.read() == []
        file = MetricsFile(path, start_step=1)
        for step in (2, 3, 4):
            file.log({"loss": 1.0}, step=step)
        assert steps(reader.read()) == [2, 3, 4]
        file.close()
        file = MetricsFile(path, start_step=3)
        file.log({"loss": 1.0}, step=4)
        file.log({"loss": 1.0}, step=5)
        file.close()
        assert steps(reader.read()) == [5]

    def test_misses_nothing_of_a_file_that_was_rewritten_and_grew_between_two_reads(
        self, tmp_path: Path
    ) -> None:
        reader = MetricsReader(tmp_path / "metrics.jsonl")
        file = MetricsFile(reader.path, start_step=0)
        for step in (1, 2, 3):
            file.log({"loss": 0.123456789012345, "norm": 0.123456789012345}, step=step)
        file.close()
        assert steps(reader.read()) == [1, 2, 3]
        before = reader.path.stat().st_size
        restarted = MetricsFile(reader.path, start_step=1)
        later = 1
        while reader.path.stat().st_size < before:
            later += 1
            restarted.log({"loss": 0.5}, step=later)
        restarted.close()
        assert later > 4
        assert steps(reader.read()) == list(range(2, later + 1))

    def test_tells_metrics_of_one_step_apart(self, tmp_path: Path) -> None:
        reader = MetricsReader(tmp_path / "metrics.jsonl", {"loss": 2})
        reader.path.write_text(line(1, loss=2.0) + line(2, loss=1.0, knn=0.5) + line(2, probe=0.6))
        assert reader.read() == [
            {"step": 2, "time": 102.0, "knn": 0.5},
            {"step": 2, "time": 102.0, "probe": 0.6},
        ]
        assert reader.seen == {"loss": 2, "knn": 2, "probe": 2}

    def test_hands_out_what_was_measured_late_under_the_step_it_belongs_to(
        self, tmp_path: Path
    ) -> None:
        reader = MetricsReader(tmp_path / "metrics.jsonl")
        file = MetricsFile(reader.path, start_step=0)
        for step in (1, 2, 3, 4):
            file.log({"loss": 1.0}, step=step)
        assert steps(reader.read()) == [1, 2, 3, 4]
        file.log({"eval/knn": 0.2}, step=2)
        file.log({"loss": 1.0}, step=5)
        file.log({"eval/knn": 0.3}, step=3)
        late = [(record["step"], record.get("eval/knn")) for record in reader.read()]
        assert late == [(2, 0.2), (5, None), (3, 0.3)]
        file.close()
        # A restart after step 2 keeps the value of that step, though it was written after step 4.
        MetricsFile(reader.path, start_step=2).close()
        kept = [(r["step"], r.get("eval/knn")) for r in read_metrics(reader.path)]
        assert kept == [(1, None), (2, None), (2, 0.2)]

    def test_leaves_the_seen_steps_of_its_caller_alone(self, tmp_path: Path) -> None:
        seen = {"loss": 1}
        reader = MetricsReader(tmp_path / "metrics.jsonl", seen)
        reader.path.write_text(line(2, loss=1.0))
        reader.read()
        assert seen == {"loss": 1}


class TestFollower:
    def test_hands_over_while_the_file_grows_and_the_rest_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        got: list[Record] = []
        some = threading.Event()

        def consume(records: list[Record]) -> None:
            got.extend(records)
            if records:
                some.set()

        with Follower(MetricsReader(path), consume, every_s=0.01):
            path.write_text(line(1, loss=2.0))
            assert some.wait(30)
            assert steps(got) == [1]
            with path.open("a") as file:
                file.write(line(2, loss=1.0))
        assert steps(got) == [1, 2]

    def test_reads_once_more_when_it_is_stopped_before_its_first_turn(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        got: list[Record] = []
        with Follower(MetricsReader(path), got.extend, every_s=3600):
            path.write_text(line(1, loss=2.0))
        assert steps(got) == [1]


class TestUri:
    @pytest.mark.parametrize(
        ("uri", "shown"),
        [
            ("http://ann:secret@host:5000/a?b=c", "http://ann:***@host:5000/a?b=c"),
            ("postgresql://ann:s@cret@host/db", "postgresql://ann:***@host/db"),
            ("http://:secret@host", "http://:***@host"),
            ("http://ann@host:5000", "http://ann@host:5000"),
            ("http://host:5000", "http://host:5000"),
            ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ],
    )
    def test_without_password_hides_the_password_only(self, uri: str, shown: str) -> None:
        assert without_password(uri) == shown

    def test_takes_the_configured_then_the_environment_then_sqlite(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert tracking_uri(None, folder=tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
        assert tracking_uri(None, folder=tmp_path) == "http://environment"
        assert tracking_uri("http://configured", folder=tmp_path) == "http://configured"
