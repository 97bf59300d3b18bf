"""The README of an exported model: how to load it, how it was compared, and what it was made from."""

import json
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.artifact import Artifact


def ancestry(model: Artifact) -> list[dict]:
    """Manifests of an artifact and of all its ancestors, parents first, each once."""
    manifests: dict[str, dict] = {}

    def visit(manifest: dict, folder: Path) -> None:
        for parent in manifest.get("parents", {}).values():
            output = artifact.read((folder / parent["path"]).resolve())
            if output is None:
                missing = parent | {"metrics": {}, "manifest": "not found"}
                manifests.setdefault(parent["digest"], missing)
            elif output.digest not in manifests:
                visit(output.manifest, output.path.parent)
        manifests[manifest["digest"]] = manifest

    visit(model.manifest, model.path.parent)
    return list(manifests.values())


def model_card(model: Artifact, lineage: list[dict], parameters: int, loader: str, notes: list[str]) -> str:
    """Markdown with the front matter that model hubs read. `loader`: the class that reads the tokenizer; `notes`:
    paragraphs below the example. No times and no paths: the same model gives the same card."""
    kind = model.manifest.get("config", {}).get("kind", model.kind)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [alma]",
        *_base_models(lineage),
        "---",
        "",
        f"# {kind} model, {parameters / 1e6:.1f} M parameters",
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM, {loader}",
        f"model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), {loader}.from_pretrained(FOLDER)",
        "```",
        "",
    ]
    for note in notes:
        lines += [note[0].upper() + note[1:], ""]
    lines += [
        "## Lineage",
        "",
        "| stage | kind | fingerprint | content digest | in | out | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_lineage_row(manifest) for manifest in lineage]
    sources = []
    for manifest in lineage:
        for name, entry in manifest.get("identity", {}).get("sources", {}).items():
            sources.append(f"| {manifest['stage']} | {name} | `{_shortened(entry)}` |")
    if sources:
        lines += ["", "## Data", "", "| stage | source | identity |", "|---|---|---|", *sources]
    software = lineage[-1].get("software", {})
    versions = ", ".join(f"{name} {version}" for name, version in software.items() if name != "platform")
    lines += ["", f"Made with alma, {versions}.", ""]
    return "\n".join(lines)


def _base_models(lineage: list[dict]) -> list[str]:
    """The key by which the Hugging Face hub links a model to those that it was made from."""
    origins = [manifest.get("origin", {}) for manifest in lineage]
    names = sorted({origin["name"] for origin in origins if origin.get("place") == "huggingface"})
    return [f"base_model: [{', '.join(names)}]"] if names else []


def _lineage_row(manifest: dict) -> str:
    summary = manifest.get("metrics", {}).get("summary", {})
    cells = [manifest["stage"], manifest["kind"], manifest["fingerprint"][:12], manifest["digest"][:12]]
    cells += [summary.get(key, "") for key in ("input", "output", "measure")]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _shortened(entry) -> str:
    text = json.dumps(entry, ensure_ascii=False, sort_keys=True).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "…"
