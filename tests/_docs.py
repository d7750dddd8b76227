"""Reads README.md, CONTRIBUTING.md and docs/: fenced blocks, the marks above them, links, paths and quoted figures."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple


def _root() -> Path:
    return next(parent for parent in Path(__file__).resolve().parents if (parent / "pyproject.toml").exists())


ROOT = _root()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", flags=re.M | re.S)
COMMENT = re.compile(r"<!-- (.*?) -->", flags=re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = r"scripts|modeling_griffin|configuration|docs|tests|results|examples|\.ci|\.github"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*[\w/]")


class Block(NamedTuple):
    """A fenced block. mark: "", "gpu", or "not run: the reason", from the comment on the line above."""

    page: Path
    line: int
    language: str
    text: str
    mark: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks in the order of the page."""
    text, blocks = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        above = text[: match.start()].splitlines()
        comment = COMMENT.fullmatch(above[-1]) if above else None
        blocks.append(Block(page, len(above) + 1, match["language"], match["text"], comment[1] if comment else ""))
    return blocks


def prose_of(page: Path) -> list[tuple[int, str]]:
    """(number, text) of every line outside fenced blocks."""
    blank = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    return list(enumerate(blank.splitlines(), start=1))


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command of a shell block; comments go, and lines that end in a backslash are joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def links_of(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link that stays in the repository."""
    found = []
    for _, line in prose_of(page):
        for target in LINK.findall(line):
            if not re.match(r"[a-z]+:", target):
                file, _, anchor = target.partition("#")
                found.append(((page.parent / file).resolve() if file else page, anchor))
    return found


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = [line.lstrip("#").strip() for _, line in prose_of(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths_of(page: Path) -> set[str]:
    """Every path of the repository that the page names outside links, in prose and in blocks."""
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text(encoding="utf-8"))
    return {match.rstrip(".") for match in PATH.findall(text)}
