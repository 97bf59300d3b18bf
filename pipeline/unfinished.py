"""Outputs that are not published yet: which a stage's folder has, whether they are worth keeping, and the checkpoint
that --fork goes on from. Nothing is written here."""

import json
from pathlib import Path

from pipeline.artifact import current
from pipeline.errors import UserError
from pipeline.files import damage_of
from pipeline.fingerprint import differences


def partials(folder: Path) -> list[Path]:
    """Unfinished outputs of a stage, oldest first."""
    found = [path for path in folder.glob("*.partial") if (path / "run.json").exists()]
    return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime)


def restarting(partial: Path) -> bool:
    """Whether an unfinished output is a --restart that was killed: what is published beside it is then not the end
    of the story."""
    known = partial / "run.json"
    return (
        known.exists()
        and not (partial / "manifest.json").exists()
        and bool(json.loads(known.read_text()).get("restart"))
    )


def fork_source(folder: Path, identity: dict, config: dict, stage: str) -> Path:
    """The checkpoint that --fork goes on from: the newest of the newest run, before the wanted last step, of a run
    on the same inputs. Raises UserError."""
    published = current(folder)
    refused = "there is none"
    for run in [*reversed(partials(folder)), *([published.path] if published else [])]:
        before = json.loads((run / "run.json").read_text())["identity"]
        steps = sorted(
            (path.parent for path in run.glob("checkpoints/step-*/complete.json")),
            key=lambda path: int(path.name.removeprefix("step-")),
        )
        changed = differences(
            {key: before.get(key) for key in ("parents", "sources")},
            {key: identity.get(key) for key in ("parents", "sources")},
        )
        early = [step for step in steps if int(step.name.removeprefix("step-")) < (config.get("steps") or float("inf"))]
        if steps and changed:
            refused = f"{run.name} was made from other inputs ({'; '.join(changed)})"
        elif steps and not early:
            refused = f"{run.name} is at {steps[-1].name} already and the recipe asks for {config['steps']} steps"
        for path in reversed(early if not changed else []):
            damaged = _torn(path)
            if damaged is None:
                return folder.resolve() / run.name / "checkpoints" / path.name
            print(f"checkpoint {path} is damaged ({damaged}) and passed over", flush=True)
            refused = f"every one of {run.name} is damaged"
    raise UserError(
        f"{folder}: --fork found no complete checkpoint of stage {stage} to go on from: {refused}; use --restart to"
        " begin anew"
    )


def _torn(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by its own marker."""
    try:
        files = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["files"]
        return next((words for name, entry in files.items() if (words := damage_of(checkpoint / name, entry))), None)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"complete.json cannot be read: {error}"


def has_work(path: Path) -> bool:
    """Whether an unfinished output holds anything that was worked for. Tables of rows (data/packing.py) are made
    again in seconds."""
    idle = {"run.json", "recipe.yaml", "metrics.jsonl", "logs", "wandb"}
    return any(
        file.is_file()
        and file.relative_to(path).parts[0] not in idle
        and file.relative_to(path).parts[:2] != ("work", "tables")
        for file in path.rglob("*")
    )
