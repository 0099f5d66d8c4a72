#!/usr/bin/env python3
"""Makes 50 MB of real text to measure preparation with: a book in 26 languages, and sources.

usage: scripts/data/make_text.py FOLDER

The book is The Debian Administrator's Handbook as plain text (33 MB), from the Debian package
`debian-handbook`, which `apt-get download` fetches. The sources are 17 MB of Python from this
Python's packages (torch, transformers). Each chapter and each source is a file. A folder that
exists is left as it is.
"""

import subprocess
import sys
import sysconfig
import tempfile
from html.parser import HTMLParser
from pathlib import Path

SOURCE_BYTES = 17_000_000
BLOCKS = {"p", "h1", "h2", "h3", "li", "div", "br", "tr", "pre"}
HIDDEN = {"script", "style"}


class Text(HTMLParser):
    """The text of a page, with a line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    def text(self) -> str:
        lines = "".join(self.parts).split("\n")
        return "\n".join(line for line in lines if line.strip()) + "\n"


def write_book(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["apt-get", "download", "debian-handbook"], cwd=work, check=True)
        (package,) = Path(work).glob("debian-handbook*.deb")
        subprocess.run(["dpkg-deb", "-x", package, work], check=True)
        pages = Path(work) / "usr/share/doc/debian-handbook/html"
        for page in sorted(pages.glob("*/**/*.html")):
            parser = Text()
            parser.feed(page.read_text(encoding="utf-8", errors="replace"))
            target = folder / page.relative_to(pages).with_suffix(".txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(parser.text(), encoding="utf-8")


def write_sources(folder: Path) -> None:
    folder.mkdir()
    packages = Path(sysconfig.get_paths()["purelib"])
    left = SOURCE_BYTES
    for number, path in enumerate(sorted(packages.glob("*/**/*.py"))):
        if left <= 0:
            return
        source = path.read_bytes()
        left -= len(source)
        (folder / f"{number:05}.py").write_bytes(source)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: scripts/data/make_text.py FOLDER")
    folder = Path(sys.argv[1])
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    write_book(partial / "book")
    write_sources(partial / "code")
    partial.rename(folder)


main()
