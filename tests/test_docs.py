"""Documentation that a program can check: links, paths and lines, and that both READMEs say the same. Commands, recipes
and the pages of the site: tests/test_pages.py."""

import itertools
import re
import unicodedata

import pytest
from module_map import modules, sentence_of
from pages import PAGES, inline_code, page_id, prose, structure
from paths import ROOT

LONGEST_LINE = 120  # columns, outside of tables, code and links that cannot be broken
FOLDERS = "pipeline|tests|benchmarks|recipes|launch|docker|docs"
PACKAGES = "core|cluster|data|train|rl|models|serve|checks"  # of pipeline/, which tables leave out
FILE = rf"(?:{FOLDERS})/[\w./-]*\.(?:py|yaml|md|sh|sbatch|json|cpu|cuda)|(?:{PACKAGES})/[\w./-]*\.py"
PATH = re.compile(rf"(?<![\w/.])({FILE})\b")
PLACEHOLDER = re.compile(r"[A-Z]{4,}|test_X|/my\.yaml")  # pipeline/KIND.py


def columns(line: str) -> int:
    """Width on a terminal: a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


def anchors(text: str) -> set[str]:
    """Names of a page's headings as GitHub makes them."""
    names = set()
    for _, line in prose(text):
        if line.startswith("#"):
            heading = re.sub(r"[`*]", "", line.lstrip("#").strip()).lower()
            names.add(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    return names


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_lead_to_files_and_headings(page):
    broken = []
    for number, line in prose(page.read_text(encoding="utf-8")):
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name) if name else page
            if not target.exists():
                broken.append(f"{page.name}:{number}: {link}")
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
                broken.append(f"{page.name}:{number}: {link}: no such heading")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_a_page_names_exist(page):
    """A file that is gone may be named as `formerly PATH`."""
    missing = []
    text = page.read_text(encoding="utf-8")
    for found in PATH.finditer(text):
        path = found[1]
        former = re.search(r"formerly\s+`?$", text[max(0, found.start() - 20) : found.start()])
        if former or PLACEHOLDER.search(path):
            continue
        if not (ROOT / path).exists() and not (ROOT / "pipeline" / path).exists():
            missing.append(f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}: {path}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_lines_are_not_wider_than_a_page(page):
    wide = []
    for number, line in prose(page.read_text(encoding="utf-8")):
        unbreakable = line.lstrip().startswith("|") or " " not in line.strip()
        if columns(line) > LONGEST_LINE and not unbreakable:
            wide.append(f"{page.name}:{number}: {columns(line)} columns")
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize("name", ["decisions.md", "log.md"])
def test_numbers_of_sections_are_unique_and_ascend(name):
    """Code and other pages refer to them; sections without a number stand anywhere."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    numbered = [int(number) for number in re.findall(r"^## (\d+)\. ", text, flags=re.MULTILINE)]
    assert len(numbered) > 40
    wrong = [f"{second} after {first}" for first, second in itertools.pairwise(numbered) if second <= first]
    assert not wrong, f"{name}: {', '.join(wrong)}"


def numbers(text: str) -> list[str]:
    return sorted(number for _, line in prose(text) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", line))


def test_the_chinese_readme_says_the_same():
    english = (ROOT / "README.md").read_text(encoding="utf-8")
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    assert structure(english) == structure(chinese)
    assert inline_code(english) == inline_code(chinese)
    # numbers are words in one language now and then ("two cores"), so only those with a unit's worth of digits count
    exact = [[number for number in numbers(text) if len(number) > 2] for text in (english, chinese)]
    assert exact[0] == exact[1]


def test_the_map_of_modules_is_complete():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE)
    actual = [str(path.relative_to(ROOT / "pipeline")) for path in modules()]
    assert sorted(listed) == sorted(actual), "run `python tests/helpers/module_map.py`"
    assert all(sentence_of(path) for path in modules()), "a module has no docstring"


def test_excerpts_are_as_the_code_is():
    """Each Python block of docs/contributing.md is preceded by the file that it is from."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    excerpts = re.findall(r"\(`(pipeline/[\w/]+\.py)`\):\n\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(excerpts) >= 3
    for path, code in excerpts:
        source = [line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
        lines = [line.strip() for line in code.splitlines()]
        places = [start for start in range(len(source)) if source[start : start + len(lines)] == lines]
        assert places, f"{path} no longer has the lines that docs/contributing.md shows"
