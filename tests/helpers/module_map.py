"""The map of modules in docs/architecture.md: one row per module, with the first sentence of its docstring.

python tests/helpers/module_map.py        writes it again
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- module map: python tests/helpers/module_map.py -->\n", "<!-- end of the module map -->\n"
FOLDERS = {
    "": "The stages, one script each, and the command line",
    "core": "Recipes, the graph of stages, the store of artifacts, running the chain",
    "data/sources": "Reading files of all formats",
    "data/cleaning": "From records to clean documents",
    "data/dedup": "Duplicates and evaluation sets",
    "data/tokenizer": "Training, importing and checking tokenizers, encoding",
    "data/tokens": "Token shards, and rows made of them",
    "data/chat": "Conversations, pairs and prompts as token ids",
    "cluster": "Jobs of a cluster: `alma run RECIPE --on slurm`",
    "train": "Engines, the training loop, checkpoints, metrics",
    "rl": "PPO",
    "models": "Building models and knowing what they cost",
    "assessment": "What stage assess reads and measures",
    "serve": "`alma chat`, `alma serve` and `alma push`",
    "report": "`alma report`",
    "manage": "`alma list`, `alma compare`, `alma gc` and `alma run --dry-run`",
    "checks": "`alma verify`, `alma inspect` and `alma plan`",
}


def modules() -> list[Path]:
    """All modules of the package that hold code, in the order of the map."""
    paths = [path for path in (ROOT / "pipeline").rglob("*.py") if path.read_text(encoding="utf-8").strip()]
    order = list(FOLDERS)
    return sorted(paths, key=lambda path: (order.index(folder_of(path)), path.name))


def folder_of(path: Path) -> str:
    folder = str(path.parent.relative_to(ROOT / "pipeline"))
    return "" if folder == "." else folder


def sentence_of(path: Path) -> str:
    """First sentence of a module's docstring, on one line; empty if it has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[\w)`\"])\.(?= [A-Z`]|$)", paragraph)[0]
    return sentence.rstrip(":.").replace("|", r"\|")


def table() -> str:
    lines = []
    for folder, title in FOLDERS.items():
        lines += [
            f"### `pipeline/{folder + '/' if folder else ''}`",
            "",
            f"{title}.",
            "",
            "| module | |",
            "| --- | --- |",
        ]
        for path in modules():
            if folder_of(path) == folder:
                lines.append(f"| `{path.relative_to(ROOT / 'pipeline')}` | {sentence_of(path)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    page = ROOT / "docs" / "architecture.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
