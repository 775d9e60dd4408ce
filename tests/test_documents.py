"""README and docs/: short where one begins, whole, and without links that lead nowhere."""

import re
from pathlib import Path

import pytest

from raysl.config.shipped import shipped_configs

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MAX_README_LINES = 150


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page}: {link}"


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_README_LINES
    assert "pip install uv && uv run raysl pretrain configs/quickstart.yaml\n" in text
    # .ci/run takes it from here.
    assert re.findall(r"pip install uv && uv run pytest[^`\n]*", text) == [
        "pip install uv && uv run pytest"
    ]


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_the_configurations_that_they_name_are_shipped() -> None:
    shipped = shipped_configs()
    verbs = {"pretrain": "", "config": "", "benchmark input": "", "sweep": "sweeps/"}
    verbs["pipeline"] = "pipelines/"
    named = set()
    for page in PAGES:
        for verb, folder in verbs.items():
            for name in re.findall(rf"^raysl {verb} (\w\S*)", page.read_text(), re.MULTILINE):
                if not name.isupper() and not name.endswith(".yaml"):
                    named.add(f"{folder}{name}")
                    assert f"{folder}{name}" in shipped, f"{page}: raysl {verb} {name}"
    assert "quickstart" in named  # they are found at all


def test_every_decision_has_a_status_and_a_date() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert pages
    for page in pages:
        third = page.read_text().splitlines()[2]
        assert re.fullmatch(r"Status: \w.*\. Date: \d{4}-\d\d-\d\d\.", third), page
