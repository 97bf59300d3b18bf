"""Pages of the documentation as tests read them: their lines, their code blocks, and the commands in these."""

import re
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    title: str
    """Name of the file that it shows; empty if it shows none."""
    text: str
    not_run: str
    """Why its commands are not run by tests, as the comment above it says; empty if they are."""


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, those in list items too."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"( *)```(\w*)(.*)", lines[number])
        if not fence:
            number += 1
            continue
        indent, end = len(fence[1]), number + 1
        while not lines[end].startswith(f"{fence[1]}```"):
            end += 1
        title = re.search(r'title="([^"]+)"', fence[3])
        reason = NOT_RUN.fullmatch(lines[number - 1].strip()) if number else None
        text = "".join(f"{line[indent:]}\n" for line in lines[number + 1 : end])
        found.append(Block(number + 1, fence[2], title[1] if title else "", text, reason[1] if reason else ""))
        number = end + 1
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block of shell code: lines that end in a backslash are joined, comments are dropped."""
    joined = re.sub(r" *\\\n *", " ", block.text)
    stripped = (re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in joined.splitlines())
    return [line for line in stripped if line]


def files(page: Path) -> dict[str, str]:
    """name -> text of the files that a page shows."""
    return {block.title: block.text for block in blocks(page) if block.title}


def page_id(path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> list[tuple[int, str]]:
    """Numbered lines outside of code blocks."""
    lines, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append((number, line))
    return lines


def structure(text: str) -> dict:
    """What two translations of a page share: levels of headings, shapes of tables, code without its comments."""
    code, tables, headings = [], [], []
    for block in re.findall(r"```[^\n]*\n(.*?)```", text, flags=re.DOTALL):
        code.append([re.sub(r"\s*#.*", "", line) for line in block.splitlines()])
    shape = [0, 0]
    for _, line in [*prose(text), (0, "")]:
        if line.startswith("|"):
            shape = [shape[0] + 1, line.replace(r"\|", "").count("|")]
        elif shape[0]:
            tables.append(tuple(shape))
            shape = [0, 0]
        if line.startswith("#"):
            headings.append(len(line) - len(line.lstrip("#")))
    return {"headings": headings, "tables": tables, "code": code}


def inline_code(text: str) -> list[str]:
    """Code within lines; what is only words, such as a placeholder, is the same in both languages, too."""
    return sorted(code for _, line in prose(text) for code in re.findall(r"`([^`]+)`", line))
