"""The recipes that come with alma, in an installed package as in the repository: a command finds them by name from any
folder (`alma run quickstart`), and a recipe elsewhere can extend them."""

import os
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic

FOLDER = Path(__file__).parents[1] / "recipes"
"""In the repository a link to its folder recipes/, whose files a wheel has here."""


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def located(path: Path) -> Path:
    """A recipe as the command line names it: a file, or the name of one that comes with alma. A file wins."""
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    shipped = named(path)
    return shipped if shipped else path


def named(path: Path) -> Path | None:
    """The shipped recipe of this name, such as `quickstart`; None if there is none or `path` is more than a name."""
    if len(path.parts) != 1 or path.name not in names():
        return None
    return FOLDER / f"{path.name}.yaml"


def extended(parent: str) -> Path | None:
    """The shipped recipe that `extends` names, if the folder of the recipe has no such file: `llama-7b`, or a file as
    the shipped recipes name each other, such as `sources/text.yaml`. So a copy of one of them works anywhere."""
    path = Path(parent)
    if path.is_absolute() or ".." in path.parts:
        return None
    file = named(path) or FOLDER / path
    return file if os.path.isfile(file) else None


def description(name: str) -> str:
    """The first comment of a shipped recipe, in one line."""
    words: list[str] = []
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or words and not text:
            break
        if not text.startswith("yaml-language-server:"):
            words.append(text)
    text = " ".join(words)
    end = text.find(". ")
    return text if end < 0 else text[:end]


def copy(name: str, target: Path) -> Path:
    """Write a shipped recipe to a file, or into a folder under its own name. Returns the file. Raises UserError for an
    unknown name, and for a file that exists."""
    source = named(Path(name))
    if source is None:
        raise UserError(f"no recipe called {name!r} comes with alma; it has {', '.join(names())}")
    path = target / source.name if target.is_dir() else target
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; give another path: alma recipe copy {name} PATH")
    if path.suffix != ".yaml":
        raise UserError(f"{path}: is neither a folder nor a file ending in .yaml; create the folder or name the file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, source.read_text(encoding="utf-8"))
    return path
