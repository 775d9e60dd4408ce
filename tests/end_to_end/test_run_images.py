"""A run and its images: where they lie, whether they are the same, what is said of them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from raysl.cli import main
from raysl.config.load import read_mapping
from raysl.config.yaml_text import to_yaml
from raysl.sources.folder import FolderSource
from raysl.sources.source import Encoded, Unreadable
from raysl.track.run_folder import RunFolder, checkpoint_path, latest_step, list_checkpoints

pytestmark = pytest.mark.usefixtures("undrawn")

RUN = """\
data: {views: {recipe: simclr, size_px: 16, blur_prob: 0.0}}
backbone: {name: resnet18, stem: small, width: 0.125}
method: {name: simclr}
optim: {name: adamw, base_lr: 1.0e-3}
train: {epochs: 2, global_batch_size: 8, log_every: 1, checkpoint_every: {steps: 1}}
evaluate: {every: null, final: [knn]}
cluster: {num_train_workers: 0, threads_per_train_worker: 1, num_data_workers: 1}
track: {mlflow: false}
"""
NCE = ("method={name: nce}", "data.views={recipe: custom, kinds: [{count: 1, size_px: 16}]}")


Draw = Callable[[Path, range], Path]


@pytest.fixture
def draw(draw_images: Callable[..., Path]) -> Draw:
    return partial(draw_images, size=(20, 24))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Draw) -> Path:
    """The working directory, with 24 images of two classes in p, and run.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSL_HOME", raising=False)
    draw(tmp_path / "p" / "cat", range(12))
    draw(tmp_path / "p" / "dog", range(12, 24))
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


@pytest.fixture
def train(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        code = main(["pretrain", str(here / "run.yaml"), *words])
        return code, capsys.readouterr().err

    return run


def interrupt(name: str) -> None:
    """Make a finished run one that was killed a step before its end."""
    folder = RunFolder(Path("runs") / name)
    folder.results.unlink()
    shutil.rmtree(checkpoint_path(folder.checkpoints, latest_step(folder.checkpoints)))
    assert list_checkpoints(folder.checkpoints)


class TestPlaces:
    def test_a_run_is_found_from_elsewhere_and_its_source_spelt_anyhow(
        self,
        here: Path,
        draw: Draw,
        train: Callable[..., tuple[int, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert train("name=r", "data.source=p", "evaluate.source=./p/")[0] == 0
        kept = read_mapping(Path("runs/r/config.yaml"))
        assert kept["data"]["source"] == kept["evaluate"]["source"] == str(here / "p")
        for spelt in ("p/", "./p", str(here / "p"), f"file://{here}/p"):
            code, said = train("name=r", f"data.source={spelt}")
            assert (code, "this run is finished" in said) == (0, True), said
        # Another folder has another p.
        draw(here / "sub" / "p" / "cow", range(30, 34))
        monkeypatch.chdir(here / "sub")
        code, said = train("name=r", "data.source=p", f"output_dir={here}/runs")
        assert code == 1
        assert f"data.source: {here}/p -> {here}/sub/p" in said
        command = ["evaluate", "../runs/r", "--protocols", "knn", "track.mlflow=false"]
        assert main([*command, "cluster.num_train_workers=0"]) == 0
        record = json.loads((here / "runs/r/evaluations/p/evaluation.json").read_text())
        assert record["source"] == str(here / "p")

    def test_a_folder_of_an_earlier_version_means_the_folder_it_was_started_from(
        self,
        here: Path,
        train: Callable[..., tuple[int, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert train("name=r", "data.source=p")[0] == 0
        file = Path("runs/r/config.yaml")
        old = read_mapping(file)
        old["data"]["source"] = "p"
        file.write_text(to_yaml(old))
        (here / "sub" / "p").mkdir(parents=True)
        monkeypatch.chdir(here / "sub")
        command = ["evaluate", "../runs/r", "--protocols", "knn", "track.mlflow=false"]
        assert main([*command, "cluster.num_train_workers=0"]) == 0
        record = json.loads((here / "runs/r/evaluations/p/evaluation.json").read_text())
        assert record["source"] == str(here / "p")
        monkeypatch.chdir(here)
        assert train("name=r", "data.source=p/")[0] == 0
        assert read_mapping(file)["data"]["source"] == str(here / "p")

    def test_what_cannot_be_opened_claims_no_name(
        self, here: Path, train: Callable[..., tuple[int, str]]
    ) -> None:
        code, said = train("name=r", "data.source=typo")
        assert code == 1
        assert "no such file or folder" in said
        assert train("name=r", "data.source=p")[0] == 0


class TestChangedImages:
    def test_are_refused_at_a_resume_and_gone_on_with_if_asked(
        self, here: Path, draw: Draw, train: Callable[..., tuple[int, str]]
    ) -> None:
        assert train("name=r", "data.source=p")[0] == 0
        interrupt("r")
        draw(here / "p" / "emu", range(40, 48))
        code, said = train("name=r", "data.source=p")
        assert code == 1
        assert "RunFolderError" in said
        assert f"images of {here}/p: 24 then, 32 now" in said
        assert "new: emu" in said
        code, said = train("name=r", "data.source=p", "data.if_changed=go_on")
        assert code == 0
        assert "from step 5 on, order and length are those of the current images" in said
        record = json.loads(Path("runs/r/source.json").read_text())
        assert (record["images"], record["earlier"][0]["images"]) == (32, 24)

    def test_a_finished_run_is_told_with_a_line(
        self, here: Path, train: Callable[..., tuple[int, str]]
    ) -> None:
        assert train("name=r", "data.source=p")[0] == 0
        (here / "p" / "cat" / "000.png").unlink()
        code, said = train("name=r", "data.source=p")
        assert code == 0
        assert "its images have changed since it began" in said
        assert "24 then, 23 now" in said
        shutil.rmtree(here / "p")
        code, said = train("name=r", "data.source=p")
        assert code == 0
        assert "its images can no longer be opened" in said

    def test_a_method_that_keeps_something_of_each_image_says_that_it_cannot_go_on(
        self, here: Path, draw: Draw, train: Callable[..., tuple[int, str]]
    ) -> None:
        assert train("name=r", "data.source=p", *NCE)[0] == 0
        interrupt("r")
        (here / "p" / "cat" / "000.png").unlink()
        code, said = train("name=r", "data.source=p", *NCE, "data.if_changed=go_on")
        assert code == 1
        assert "RunFolderError: method nce cannot continue with these images" in said
        assert "bank (24, 128) in the checkpoint, (23, 128) now" in said
        draw(here / "p" / "cat", range(1))
        assert train("name=r", "data.source=p", *NCE)[0] == 0  # put back


class TestNotes:
    def test_are_said_once_at_the_start_and_kept(
        self,
        here: Path,
        train: Callable[..., tuple[int, str]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        class Noted(FolderSource):
            def __init__(self, *given: object, **named: object) -> None:
                super().__init__(*given, **named)  # type: ignore[arg-type]
                self.notes = tuple(f"{number} files of a kind" for number in range(20))

        monkeypatch.setattr("raysl.sources.image_folders.FolderSource", Noted)
        code, said = train("name=r", "data.source=p")
        assert code == 0
        assert said.count("0 files of a kind") == 2  # and 10 files
        assert "12 files of a kind" not in said
        assert f"8 more: raysl data {here}/p" in said
        assert len(json.loads(Path("runs/r/source.json").read_text())["notes"]) == 20
        for command in (
            ["embed", "p", "runs/r", "emb", "num_workers=0"],
            ["pack", "p", "packed", "num_workers=0"],
            ["search", "emb", "--rows", "0"],
            ["evaluate", "runs/r", "--protocols", "knn", "cluster.num_train_workers=0"],
            ["config", "run.yaml", "data.source=p"],
            ["finetune", "runs/r", "train.epochs=1", "train.global_batch_size=8"],
        ):
            assert main(command) == 0
            said = capsys.readouterr().err
            assert said.count(f"8 more: raysl data {here}/p") == 1, command


class TestUnreadable:
    def test_a_file_that_cannot_be_read_is_a_bad_image_by_one_id_in_every_list(
        self,
        here: Path,
        train: Callable[..., tuple[int, str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        class Damaged(FolderSource):
            def read(self, indices: object) -> list[Encoded]:
                found = super().read(indices)  # type: ignore[arg-type]
                lost = Unreadable("cannot be read: Input/output error")
                return [
                    lost if row == 3 else each
                    for row, each in zip(indices, found, strict=True)  # type: ignore[call-overload]
                ]

        monkeypatch.setattr("raysl.sources.image_folders.FolderSource", Damaged)
        assert train("name=r", "data.source=p", "data.bad_images.max_share=0.1")[0] == 0
        share = "max_bad_share=0.1"
        assert main(["embed", "p", "runs/r", "emb", "num_workers=0", share]) == 0
        assert main(["pack", "p", "packed", "num_workers=0", share]) == 0
        command = ["evaluate", "runs/r", "--protocols", "knn", "cluster.num_train_workers=0"]
        assert main(command) == 0
        wanted = {
            "row": 3,
            "id": "cat/003.png",
            "name": str(here / "p" / "cat" / "003.png"),
            "reason": "cannot be read: Input/output error",
        }
        lists = "runs/r/bad_images.jsonl", "emb/_bad_images.jsonl", "packed/bad_images.jsonl"
        for path in lists:
            (line,) = Path(path).read_text().splitlines()
            assert {k: v for k, v in json.loads(line).items() if k != "step"} == wanted, path

    @pytest.mark.parametrize("policy", ["skip", "replace"])
    def test_a_source_without_one_good_image_ends_with_the_reason(
        self, here: Path, train: Callable[..., tuple[int, str]], policy: str
    ) -> None:
        for path in (here / "p").rglob("*.png"):
            path.write_bytes(b"no picture at all")
        code, said = train("name=r", "data.source=p", f"data.bad_images.policy={policy}")
        assert code == 1
        assert "is bad (not an image of a known format), and so were 100 others" in said
