"""Whether what stages published is still what they wrote."""

from pathlib import Path

from pipeline.core import artifact
from pipeline.core.errors import UserError
from pipeline.core.graph import Node
from pipeline.core.terminal import many, show


def prove(graph: dict[str, Node], stages: list[str], recipe: str) -> None:
    """Hash what each of `stages` (none: all) has published and print a line for each. Raises UserError if one is
    missing, damaged, or made from what its parents no longer are."""
    bad = 0
    for name, node in graph.items():
        if stages and name not in stages:
            continue
        found = artifact.current(node.folder)
        if found is None:
            show(f"{name:<12} missing      nothing is published")
            bad += 1
            continue
        problem = found.damage(full=True) or _lineage(found, node.folder)
        size = sum(entry["size"] for entry in found.manifest["files"].values())
        bad += problem is not None
        whole = f"{many(len(found.manifest['files']), 'file')}, {size / 1e6:.1f} MB, digest {found.digest[:12]}"
        show(f"{name:<12} damaged      {problem}" if problem else f"{name:<12} whole        {whole}")
    if bad:
        raise UserError(
            f"{recipe}: {bad} of {many(len(stages or graph), 'output')} {'is' if bad == 1 else 'are'} missing or"
            f" damaged; alma run {recipe} makes {'it' if bad == 1 else 'them'} again"
        )


def _lineage(found: artifact.Artifact, folder: Path) -> str | None:
    """Whether the parents that an output names are still what it was made from."""
    for key, parent in found.manifest.get("parents", {}).items():
        if parent["kind"] == "external":
            continue
        path = (folder / parent["path"]).resolve()
        made_from = artifact.read(path)
        if made_from is None:
            return f"its parent {key} ({path}) is gone"
        if made_from.digest != parent["digest"]:
            return (
                f"its parent {key} ({path}) has digest {made_from.digest[:12]}, it was made from"
                f" {parent['digest'][:12]}"
            )
    return None
