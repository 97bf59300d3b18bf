"""Hand a model over: a folder for `from_pretrained`, its logits compared with the training model's, a card with lineage
and numbers.

    python pipeline/export.py recipes/quickstart.yaml
    python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("runs/quickstart/export/current")'

The folder holds what vLLM, lm-eval, TRL, transformers 4.57 and llama.cpp's converter read as well: safetensors, config,
generation config, tokenizer with chat template. The card says where one of them would read other ids.
"""

import json
from typing import Literal

from pydantic import Field

from pipeline.core import artifact, faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import PublishedModel, StageConfig
from pipeline.core.files import write_atomic
from pipeline.core.output import Output
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.seeds import derive

# 2: also in the form that transformers 4.57 and llama.cpp's converter read
VERSION = 2
INPUTS = {"model": ("ppo", "dpo", "sft", "pretrain")}

# Largest difference of a logit that is taken for the same model. fp32 is the same arithmetic on the same numbers, so
# the file must give it back exactly; bf16 keeps 8 bits of each weight (2^-9 relative), so there the likeliest token is
# compared, on random text where ties are near.
FP32_TOLERANCE = 1e-6
BF16_AGREEMENT = 0.9


class Config(StageConfig):
    """What to hand over."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the exported weights; bf16 halves the file and rounds."""
    compare_tokens: int = Field(512, ge=16)
    """Random tokens on which the exported model's logits are compared with the training model's."""

    @classmethod
    def published_model(cls, artifact: Artifact) -> PublishedModel:
        kind = artifact.manifest["parents"]["model"]["kind"]
        if kind in KINDS:
            use = module_of(kind).Config.MODEL.use
        else:  # a folder made elsewhere
            use = "chat" if (artifact.path / "chat_template.jinja").exists() else "completion"
        return PublishedModel("", use, for_users=True)


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.core.terminal import say
    from pipeline.data.tokenizer import export_tokenizer
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import cost
    from pipeline.models.build import load, quiet
    from pipeline.models.transformers_4 import add_older_keys
    from pipeline.train import distributed

    distributed.setup()
    source = inputs["model"].path / "model"
    if not (source / "config.json").exists():
        source = inputs["model"].path  # a folder made elsewhere

    trained = load(source).eval()
    tokenizer = load_tokenizer(source)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    with quiet():
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=True).save_pretrained(output.path)
    add_older_keys(output.path)
    export_tokenizer.write(tokenizer, source, output.path, trained.get_input_embeddings().num_embeddings)
    faults.point("save")

    # The proof reads what was written, as a user will.
    with quiet():
        exported = AutoModelForCausalLM.from_pretrained(output.path, dtype=dtype, local_files_only=True).eval()
    generator = torch.Generator().manual_seed(derive(config.seed, "export"))
    length = min(128, trained.config.max_position_embeddings)
    ids = torch.randint(len(tokenizer), (max(1, config.compare_tokens // length), length), generator=generator)
    with torch.no_grad():
        expected, found = trained(input_ids=ids).logits.float(), exported(input_ids=ids).logits.float()
    difference = (expected - found).abs().max().item()
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean().item()
    faults.point("work")
    if config.dtype == "fp32" and difference > FP32_TOLERANCE:
        raise AssertionError(
            f"the exported model's logits differ from the training model's by {difference:g}, more than"
            f" {FP32_TOLERANCE:g}"
        )
    if agreement < BF16_AGREEMENT:
        raise AssertionError(
            f"the exported model's likeliest token is the training model's in {agreement:.1%} of {ids.numel()} places,"
            f" expected {BF16_AGREEMENT:.0%}"
        )

    loader, remarks = export_tokenizer.readers(output.path)
    for remark in remarks:
        say(f"export: {remark}")
    lineage = ancestry(inputs["model"])
    parameters = cost.count(trained).total
    measured = (
        f"Weights are {config.dtype}. Compared with the training model on {ids.numel()} random tokens: largest"
        f" difference of a logit {difference:.3g}, same likeliest token {agreement:.2%}."
    )
    card = model_card(inputs["model"], lineage, parameters, loader, [measured, *remarks])
    write_atomic(output.path / "README.md", card)
    return {
        "logit_difference": difference,
        "top1_agreement": agreement,
        "compared_tokens": ids.numel(),
        "parameters": parameters,
        "tokenizer_class": loader,
        "summary": {
            "input": f"{inputs['model'].stage}, {parameters / 1e6:.1f} M parameters",
            "output": f"{config.dtype} safetensors, tokenizer, card",
            "measure": f"logits differ by {difference:.1g} on {ids.numel()} tokens",
        },
    }


def ancestry(found: Artifact) -> list[dict]:
    """Manifests of an artifact and of all it was made from, parents first, each once."""
    ordered: dict[str, dict] = {}

    def visit(manifest: dict, folder) -> None:
        for parent in manifest.get("parents", {}).values():
            before = artifact.read((folder / parent["path"]).resolve())
            if before is None:
                ordered.setdefault(parent["digest"], {**parent, "metrics": {}, "manifest": "not found"})
            elif before.digest not in ordered:
                visit(before.manifest, before.path.parent)
        ordered[manifest["digest"]] = manifest

    visit(found.manifest, found.path.parent)
    return list(ordered.values())


def model_card(found: Artifact, lineage: list[dict], parameters: int, loader: str, notes: list[str]) -> str:
    """Markdown with the front matter that model hubs read. `loader`: the class that reads the tokenizer; `notes`:
    paragraphs below the example. No times and no paths: the same model gives the same card."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [alma]",
        "---",
        "",
        f"# {found.manifest.get('config', {}).get('kind', found.kind)} model, {parameters / 1e6:.1f} M parameters",
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM, {loader}",
        f"model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), {loader}.from_pretrained(FOLDER)",
        "```",
        "",
        *(line for note in notes for line in (note[0].upper() + note[1:], "")),
        "## Lineage",
        "",
        "| stage | kind | fingerprint | content digest | in | out | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for manifest in lineage:
        summary = manifest.get("metrics", {}).get("summary", {})
        cells = [
            manifest["stage"],
            manifest["kind"],
            manifest["fingerprint"][:12],
            manifest["digest"][:12],
            *(summary.get(key, "") for key in ("input", "output", "measure")),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    sources = [
        (manifest["stage"], name, entry)
        for manifest in lineage
        for name, entry in manifest.get("identity", {}).get("sources", {}).items()
    ]
    if sources:
        lines += ["", "## Data", "", "| stage | source | identity |", "|---|---|---|"]
        lines += [f"| {stage} | {name} | `{_brief(entry)}` |" for stage, name, entry in sources]
    software = {name: version for name, version in lineage[-1].get("software", {}).items() if name not in ("platform",)}
    lines += ["", "Made with alma, " + ", ".join(f"{name} {version}" for name, version in software.items()) + ".", ""]
    return "\n".join(lines)


def _brief(entry) -> str:
    text = json.dumps(entry, ensure_ascii=False, sort_keys=True).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "…"


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("export")
