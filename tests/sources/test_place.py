"""A source is one place, whatever folder one stands in and however it is spelt."""

from pathlib import Path

import pytest

from raysl.sources.place import absolute_config, absolute_source, as_place, place_key
from raysl.sources.source import DataConfig, WeightedSource


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    (folder / "p").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAYSL_HOME", raising=False)
    return folder


class TestAbsoluteSource:
    @pytest.mark.parametrize(
        "spelt", ["p", "p/", "./p", "p//", "../here/p", "{here}/p", "{here}/p/"]
    )
    def test_every_spelling_is_one_place(self, here: Path, spelt: str) -> None:
        assert absolute_source(spelt.format(here=here)) == f"{here}/p"

    def test_a_file_uri_is_its_path(self, here: Path) -> None:
        assert absolute_source(f"file://{here}/p/") == f"{here}/p"
        assert absolute_source(f"file://{here}/two%20words") == f"{here}/two words"

    def test_patterns_keep_their_signs(self, here: Path) -> None:
        assert absolute_source("p/*.tar") == f"{here}/p/*.tar"
        assert absolute_source("p/{000..099}.tar") == f"{here}/p/{{000..099}}.tar"
        assert absolute_source("../x/[ab]?.parquet") == f"{here.parent}/x/[ab]?.parquet"

    def test_sets_and_stores_stay(self, here: Path) -> None:
        (here / "cifar10").mkdir()
        for source in ("digits", "cifar10", "s3://bucket/p", "hf://datasets/x/*.parquet"):
            assert absolute_source(source) == source
        assert absolute_source("s3://bucket/p/") == "s3://bucket/p"

    def test_the_home_folder_is_spelt_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        assert absolute_source("~/photos") == "/home/someone/photos"

    def test_here_comes_first_and_then_where_runs_are(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = here.parent / "home"
        monkeypatch.setenv("RAYSL_HOME", str(home))
        for name in ("p", "q"):
            (home / name).mkdir()
        (home / "q" / "0.tar").touch()
        assert absolute_source("p") == f"{here}/p"
        assert absolute_source("q") == f"{home}/q"
        assert absolute_source("q/*.tar") == f"{home}/q/*.tar"
        assert absolute_source("q/{0..3}.tar") == f"{home}/q/{{0..3}}.tar"
        assert absolute_source("nowhere") == f"{here}/nowhere"
        assert absolute_source("p", first=[home]) == f"{home}/p"

    def test_two_dots_behind_a_link_mean_the_folder_above_its_target(self, here: Path) -> None:
        (here.parent / "far" / "deep").mkdir(parents=True)
        (here / "link").symlink_to(here.parent / "far" / "deep")
        assert absolute_source("link/../p") == f"{here}/link/../p"
        assert place_key("link/../p") == f"{here.parent}/far/p"


class TestConfig:
    def test_all_that_names_a_place_is_absolute(self, here: Path) -> None:
        config = DataConfig(
            source="p",
            filter=(("path", "not in file", "drop.txt"), ("bytes", ">", 10)),
            mix=(WeightedSource(source="q", filter=(("row_id", "in file", "some.txt"),)),),
            torchvision_root="sets",
        )
        found = absolute_config(config)
        assert found.source == f"{here}/p"
        assert found.filter == (("path", "not in file", f"{here}/drop.txt"), ("bytes", ">", 10))
        assert found.mix[0].source == f"{here}/q"
        assert found.mix[0].filter == (("row_id", "in file", f"{here}/some.txt"),)
        assert found.torchvision_root == f"{here}/sets"
        assert absolute_config(found) is found

    def test_a_folder_of_each_users_home_stays(self) -> None:
        assert absolute_config(DataConfig(source="digits")) == DataConfig(source="digits")


class TestCompare:
    def test_links_lead_to_one_place(self, here: Path) -> None:
        (here / "link").symlink_to(here / "p")
        assert as_place("source", "link") == as_place("source", "p/")
        assert as_place("source", "p") != as_place("source", "q")

    def test_the_copy_that_ray_makes_of_a_jobs_folder_is_one_place_each_time(self) -> None:
        copies = [
            f"/tmp/ray/session_{n}/runtime_resources/working_dir_files/_ray_pkg_{n}/p" for n in "ab"
        ]
        assert place_key(copies[0]) == place_key(copies[1]) != place_key(copies[0] + "2")

    def test_mixed_sources_and_list_files_are_places_too(self, here: Path) -> None:
        mix = [{"source": "p", "weight": 1.0}], [{"source": f"{here}/p/", "weight": 1.0}]
        assert as_place("mix", mix[0]) == as_place("mix", mix[1])
        assert as_place("mix", mix[0]) != as_place("mix", [{"source": "p", "weight": 2.0}])
        lists = [["path", "in file", "d.txt"]], [("path", "in file", f"{here}/d.txt")]
        assert as_place("filter", lists[0]) == as_place("filter", lists[1])
        assert as_place("filter", [["n", "==", 1]]) == [["n", "==", 1]]
        assert as_place("limit", 3) == 3
