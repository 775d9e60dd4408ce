"""The page of all settings is what the classes say."""

from pathlib import Path

from raysl.config_reference import reference
from raysl.methods import method_names

PAGE = Path(__file__).parents[2] / "docs" / "config_reference.md"


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each key; of one that several sections have, those of the first."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
            found.setdefault(cells[0].strip("`"), cells[1:])
    return found


def test_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), f"write it anew: raysl config --reference {PAGE}"


def test_every_row_has_key_type_default_and_meaning() -> None:
    found = rows(reference())
    assert all(len(cells) == 3 and cells[0] for cells in found.values())
    assert [key for key, cells in found.items() if not cells[2]] == []
    assert not [line for line in reference().splitlines() if line.endswith("|  |")]
    assert found["seed"][:2] == ["integer >= 0, < 2^63", "`0`"]
    assert found["data.source"][:2] == ["text", ""]
    assert found["data.views"][1] == "`simclr`"
    assert found["data.pages"][0] == "`refuse`, `first`, `channels`"
    assert found["cluster.num_data_workers"][:2] == ["integer > 0 or null", "`null`"]
    assert "all CPUs that are left" in found["cluster.num_data_workers"][2]


def test_every_method_and_verb_has_a_section() -> None:
    text = reference()
    assert all(f"### method: {name}\n" in text for name in method_names())
    assert all(f"`raysl {verb}`" in text for verb in ("sweep", "pipeline", "evaluate", "pack"))
