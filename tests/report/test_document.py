from pathlib import Path

from raysl.report.document import draw_each, files_section, picture_html, section, write_page


def test_what_cannot_be_drawn_is_told_and_leaves_no_old_picture(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise ValueError("no data")

    (tmp_path / "bad.png").write_bytes(b"old")
    failures = draw_each(tmp_path, {"bad": fail, "good": lambda path: path.touch()})
    assert failures == [("bad", "ValueError: no data")]
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]


def test_a_page_holds_its_sections_in_order_and_leaves_out_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    write_page(
        path, name="<b>", lead="It is.", sections=[section("One", "1"), "", section("B", "2")]
    )
    text = path.read_text()
    assert "<title>&lt;b&gt; - raysl</title>" in text
    assert text.index("<h1>&lt;b&gt;</h1>") < text.index("It is.") < text.index("<h2>One</h2>")
    assert text.count("<section>") == 2
    assert "default-src 'none'" in text


def test_a_picture_is_shown_at_half_its_pixels(tmp_path: Path) -> None:
    size = (1320).to_bytes(4, "big") + (620).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8) + size)
    assert "width=660 height=310" in picture_html(tmp_path, "a", "A picture")
    assert f"not drawn ({tmp_path.name}/b.png)" in picture_html(tmp_path, "b", "Another")


def test_lists_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    text = files_section(tmp_path, [("a.txt", "letters"), ("b.txt", "more")])
    assert "<code>a.txt</code><td>letters" in text
    assert "b.txt" not in text
