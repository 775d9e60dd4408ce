from pathlib import Path

import pytest

from raysl.report.figure import drawable_name, new_figure, save_png


class TestSavePng:
    def test_keeps_the_old_picture_and_no_rubbish_when_drawing_fails(self, tmp_path: Path) -> None:
        path = tmp_path / "pictures" / "a.png"
        save_png(new_figure(height_in=1), path)
        before = path.read_bytes()
        broken = new_figure(height_in=1)
        broken.text(0.5, 0.5, r"$\notacommand{$")
        with pytest.raises(ValueError, match="notacommand"):
            save_png(broken, path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["a.png"]


class TestDrawableName:
    def test_puts_a_name_on_one_short_line(self) -> None:
        assert drawable_name("a\n b\tc", otherwise="class 1") == "a b c"
        assert drawable_name("x" * 50, otherwise="class 1") == "x" * 17 + "..."

    @pytest.mark.parametrize("name", ["", " \n", "\u732b", "a\x07"])
    def test_gives_the_other_name_if_there_is_nothing_the_font_can_draw(self, name: str) -> None:
        assert drawable_name(name, otherwise="class 1") == "class 1"
