"""The end of a run as its user reads it: what each stage did, where its result is, and how to talk to the model."""

import os
import shlex
import sys

from pipeline.core.artifact import Artifact
from pipeline.core.graph import Node
from pipeline.core.terminal import columns, show

CHAT = ("sft", "dpo", "ppo")
BASE = ("pretrain",)
PIPED = 160  # columns of the table in a file
LEAST = {"in": 10, "out": 10, "measured": 20}  # columns that these need to be read
TITLES = ("stage", "in", "out", "measured", "time")
QUESTION = """\
    chat = [{"role": "user", "content": text.strip()}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True,
        return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=64)
    new = made[0, ids["input_ids"].shape[1]:]
    print(tokenizer.decode(new, skip_special_tokens=True))
"""
CONTINUATION = """\
    ids = tokenizer(text.strip(), return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=64)
    print(tokenizer.decode(made[0], skip_special_tokens=True))
"""


def shown_path(artifact: Artifact) -> str:
    """Where a stage's published result is, from here."""
    return os.path.relpath(artifact.path.parent / "current")


def model_of(artifact: Artifact) -> str | None:
    """The folder for from_pretrained that a stage made, or None."""
    if artifact.kind == "export":
        return shown_path(artifact)
    if artifact.kind in (*CHAT, *BASE, "reward"):
        return os.path.join(shown_path(artifact), "model")
    return None


def result(artifact: Artifact) -> str:
    """One line: time, what was measured, and where the result is."""
    summary = artifact.metrics.get("summary", {})
    told = [f"done in {seconds(artifact.manifest['seconds'])}", summary.get("measure", "")]
    place = model_of(artifact) or shown_path(artifact)
    return f"{artifact.stage}: {', '.join(part for part in told if part)}; the result is in {place}"


def seconds(number: float) -> str:
    """Whole seconds up to an hour, as a table of a short run compares them; hours and minutes above."""
    if number < 3600:
        return f"{number:.0f} s"
    hours, minutes = divmod(round(number / 60), 60)
    return f"{hours} h {minutes:02d} min"


def show_chain(graph: dict[str, Node]) -> None:
    """The table of all stages that are up to date, and how to talk to the model that they made."""
    show_table(graph)
    made = [
        node.output for node in graph.values() if node.state == "up to date" and node.output and model_of(node.output)
    ]
    models = [output for output in made if output.kind != "reward"]
    if models:
        chosen = next((output for output in models if output.kind == "export"), models[-1])
        show(f"model      {model_of(chosen)}")
        show("           To talk to it, paste this into a shell:\n")
        print(talk(chosen), flush=True)


def talk(artifact: Artifact) -> str:
    """A shell command that reads lines from the terminal and prints the model's answers, or for a base model its
    continuations."""
    kind = artifact.kind
    if kind == "export":
        kind = artifact.manifest["parents"]["model"]["kind"]
    loader = artifact.metrics.get("tokenizer_class", "PreTrainedTokenizerFast")
    folder = model_of(artifact)
    chats = kind in CHAT or kind not in BASE and os.path.exists(os.path.join(folder, "chat_template.jinja"))
    verb = "Ask" if chats else "Begin"
    program = f"""
import sys
from transformers import AutoModelForCausalLM
from transformers import {loader}
folder = {quoted(folder)}
tokenizer = {loader}.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
print("{verb} something; Ctrl-D ends.")
for text in sys.stdin:
{QUESTION if chats else CONTINUATION}"""
    return f"python -c {shlex.quote(program)}"


def quoted(text: str) -> str:
    """A Python literal with double quotes, so that the program can stand in a shell's single ones."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def show_table(graph: dict[str, Node]) -> None:
    """The story of the chain: a line a stage. What went in, what came out, its metric before and after, time."""
    rows, total = [], 0.0
    for name, node in graph.items():
        if node.state != "up to date" or node.output is None:
            continue
        summary, spent = node.output.metrics.get("summary", {}), node.output.manifest["seconds"]
        total += spent
        rows.append([name, *(summary.get(key, "") for key in ("input", "output", "measure")), seconds(spent)])
    rows.append(["all", "", "", "", seconds(total)])
    width = columns(sys.stdout) or PIPED
    if needed(rows) <= width:
        _as_table(rows, width)
    else:
        _as_paragraphs(rows)


def needed(rows: list[list[str]]) -> int:
    """Columns of a terminal below which the table would break words or times."""
    least = zip(TITLES, _least_widths(rows), strict=True)
    return sum(max(width, LEAST.get(title, 0)) for title, width in least) + 3 * len(TITLES)


def _least_widths(rows: list[list[str]]) -> list[int]:
    """The longest word of each column; of times, which are not broken, the longest."""
    from rich.cells import cell_len

    found = []
    for title, cells in zip(TITLES, zip(*rows, strict=True), strict=True):
        pieces = [title, *cells] if title == "time" else [title, *(word for cell in cells for word in cell.split())]
        found.append(max(map(cell_len, pieces)))
    return found


def _as_table(rows: list[list[str]], width: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title, least in zip(TITLES, _least_widths(rows), strict=True):
        # what was measured is the longest: where there is little room, it gets what the others can spare
        most = max(least, width // 5) if title in ("in", "out") and width < PIPED else None
        justify = "right" if title == "time" else "left"
        table.add_column(title, min_width=least, max_width=most, no_wrap=title == "time", justify=justify)
    for row in rows[:-1]:
        table.add_row(*map(Text, row))
    table.add_section()
    table.add_row(*rows[-1])
    Console(width=width, highlight=False).print(table)


def _as_paragraphs(rows: list[list[str]]) -> None:
    """For a narrow terminal: a stage and its time, and below it a line for each of the rest."""
    for name, *cells, spent in rows:
        show(f"{name}  {spent}")
        for title, cell in zip(TITLES[1:-1], cells, strict=True):
            if cell:
                show(f"  {title:<8}  {cell}")
