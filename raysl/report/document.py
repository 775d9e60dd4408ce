"""Building blocks of HTML pages: self-contained files that load nothing from the network."""

import base64
import html
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from raysl.folder.whole import write_text
from raysl.report.style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def draw_each(
    pictures: Path, drawings: Mapping[str, Callable[[Path], None]]
) -> list[tuple[str, str]]:
    """Draw pictures by name; one that fails does not stop the others.

    Args:
        pictures: Folder for ``NAME.png``; the previous file of a picture that fails is removed.
        drawings: For each name, a function that draws into a file.

    Returns:
        The name and the error of each picture that failed.
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
        path: The file.
        name: Title and heading.
        lead: HTML of the sentences below the heading.
        sections: HTML of :func:`section`; empty ones are left out.
    """
    parts = [f"<h1>{escape(name)}</h1>\n<p class=lead>{lead}</p>", *filter(None, sections)]
    page = (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">\n'
        f"<title>{escape(name)} - raysl</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_text(path, page)


def section(title: str, content: str, note: str = "") -> str:
    """Return a section of a page; all arguments are HTML."""
    after = f"\n<p class=note>{note}</p>" if note else ""
    return f"<section>\n<h2>{title}</h2>\n{content}{after}\n</section>"


def shown_picture(folder: Path, name: str, alt: str) -> str:
    """Return a picture embedded in the page, at half of its pixel size.

    Args:
        folder: Holds ``NAME.png``; a missing or damaged file is replaced by a note.
        name: The picture's name.
        alt: HTML of the alternative text.
    """
    try:
        data = (folder / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # in the PNG's first chunk
    except (OSError, struct.error):
        return f"<p class=note>This picture was not drawn ({folder.name}/{name}.png).</p>"
    encoded = base64.b64encode(data).decode("ascii")
    return (
        f'<img alt="{alt}" width={width // 2} height={height // 2} '
        f'src="data:image/png;base64,{encoded}">'
    )


def files_section(folder: Path, files: Iterable[tuple[str, str]]) -> str:
    """Return a list of a folder's files.

    Args:
        folder: The folder.
        files: Name and description; missing files are left out.
    """
    rows = "\n".join(
        f"<tr><th scope=row><code>{name}</code><td>{what}"
        for name, what in files
        if (folder / name).exists()
    )
    where = f"<p class=path><code>{escape(folder)}</code></p>"
    return section("Files", f"{where}<div class=scroll><table>\n{rows}\n</table></div>")


def folded(summary: str, content: str) -> str:
    """Return collapsible HTML that opens on a click."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def escape(value: object) -> str:
    """Escape a value as HTML text."""
    return html.escape(str(value))
