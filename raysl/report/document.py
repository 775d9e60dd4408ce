"""Write HTML pages: self-contained files that load nothing from the network."""

import base64
import html
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from raysl.folder.whole import write_text
from raysl.report.style import STYLE

_PNG_SIZE = slice(16, 24)  # width and height in a PNG's first chunk, big-endian
_CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def draw_each(
    pictures: Path, drawings: Mapping[str, Callable[[Path], None]]
) -> list[tuple[str, str]]:
    """Draw pictures; a picture that fails does not stop the others.

    Args:
        pictures: Folder for ``NAME.png``; if a picture fails, its previous file is deleted.
        drawings: Functions that draw into a file, by the picture's name.

    Returns:
        Name and error of each picture that failed.
    """
    failures = []
    for name, draw in drawings.items():
        path = pictures / f"{name}.png"
        try:
            draw(path)
        except Exception as error:  # a failed picture must not end a run
            path.unlink(missing_ok=True)
            failures.append((name, f"{type(error).__name__}: {error}"))
    return failures


def write_page(path: Path, *, name: str, lead: str, sections: Iterable[str]) -> None:
    """Write a page atomically.

    Args:
        path: The file to write.
        name: Title and heading, as plain text.
        lead: HTML of the paragraph below the heading.
        sections: HTML of each section, as from :func:`section`; empty ones are left out.
    """
    parts = [f"<h1>{escape(name)}</h1>\n<p class=lead>{lead}</p>", *filter(None, sections)]
    page = (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv=Content-Security-Policy content="{_CONTENT_POLICY}">\n'
        f"<title>{escape(name)} - raysl</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_text(path, page)


def section(title: str, content: str, note: str = "") -> str:
    """Return the HTML of a section of a page; all arguments are HTML."""
    note_html = f"\n<p class=note>{note}</p>" if note else ""
    return f"<section>\n<h2>{title}</h2>\n{content}{note_html}\n</section>"


def picture_html(folder: Path, name: str, alt: str) -> str:
    """Return HTML with an embedded picture.

    Its size on the page is half of its size in pixels, so that it is sharp on screens with two
    pixels per CSS pixel.

    Args:
        folder: Folder of ``NAME.png``; if the file is missing or too short, the HTML is a note.
        name: The picture's name.
        alt: HTML of the alternative text.
    """
    try:
        data = (folder / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[_PNG_SIZE])
    except (OSError, struct.error):
        return f"<p class=note>This picture was not drawn ({folder.name}/{name}.png).</p>"
    encoded = base64.b64encode(data).decode("ascii")
    return (
        f'<img alt="{alt}" width={width // 2} height={height // 2} '
        f'src="data:image/png;base64,{encoded}">'
    )


def files_section(
    folder: Path, files: Iterable[tuple[str, str]], *, shown: str | None = None
) -> str:
    """Return the HTML of a section that lists the files of a folder.

    Args:
        folder: The folder of the files.
        files: Name and HTML description of each file; missing files are left out.
        shown: The folder's address in a store, of which ``folder`` is a local copy.
    """
    rows = "\n".join(
        f"<tr><th scope=row><code>{name}</code><td>{description}"
        for name, description in files
        if (folder / name).exists()
    )
    where = f"<p class=path><code>{escape(shown or folder)}</code></p>"
    return section("Files", f"{where}<div class=scroll><table>\n{rows}\n</table></div>")


def collapsible(summary: str, content: str) -> str:
    """Return HTML whose content opens on a click on the summary; both arguments are HTML."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def escape(value: object) -> str:
    """Escape a value as HTML text."""
    return html.escape(str(value))
