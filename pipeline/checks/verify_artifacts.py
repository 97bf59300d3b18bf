"""`alma verify artifacts`: whether published outputs are still what their stages wrote."""

from pathlib import Path

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.graph import Node
from pipeline.core.terminal import byte_size, plural, show


def verify(graph: dict[str, Node], stages: list[str], recipe: str) -> None:
    """Hash what each of `stages` (none: all) has published, and print a line for each. Raises UserError if one is
    missing, damaged, or made from parents that have changed."""
    num_bad = 0
    for name, node in graph.items():
        if stages and name not in stages:
            continue
        output = artifact.current(node.folder)
        if output is None:
            show(f"{name:<12} missing      nothing is published")
            num_bad += 1
            continue
        problem = output.damage(full=True) or _changed_parent(output, node.folder)
        if problem:
            show(f"{name:<12} damaged      {problem}")
            num_bad += 1
        else:
            files = output.manifest["files"].values()
            size = byte_size(sum(entry["size"] for entry in files))
            show(f"{name:<12} complete     {plural(len(files), 'file')}, {size}, digest {output.digest[:12]}")
    if num_bad:
        verb, pronoun = ("is", "it") if num_bad == 1 else ("are", "them")
        raise UserError(
            f"{recipe}: {num_bad} of {plural(len(stages or graph), 'output')} {verb} missing or damaged; alma run"
            f" {recipe} makes {pronoun} again"
        )


def _changed_parent(output: Artifact, folder: Path) -> str | None:
    """A parent that is not any more what the output was made from, in words, or None."""
    for key, parent in output.manifest.get("parents", {}).items():
        if parent["kind"] == "external":
            continue
        path = (folder / parent["path"]).resolve()
        current = artifact.read(path)
        if current is None:
            return f"its parent {key} ({path}) does not exist any more"
        if current.digest != parent["digest"]:
            return (
                f"its parent {key} ({path}) has digest {current.digest[:12]}, it was made from {parent['digest'][:12]}"
            )
    return None
