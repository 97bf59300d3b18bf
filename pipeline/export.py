"""Export a model: a folder for `from_pretrained`, verified against the training model, with a card.

    python pipeline/export.py recipes/quickstart.yaml
    python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("runs/quickstart/export/current")'

The folder is also for vLLM, lm-eval, TRL, transformers 4.57 and llama.cpp's converter: safetensors, config, generation
config, tokenizer with chat template. The card says where one of them would read other ids.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.core import artifact, faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import PlannedInput, PublishedModel, StageConfig
from pipeline.core.files import write_atomic
from pipeline.core.output import Output
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.seeds import derive
from pipeline.core.terminal import say

# 2: also in the form that transformers 4.57 and llama.cpp's converter read
VERSION = 2
INPUTS = {"model": ("ppo", "grpo", "dpo", "kto", "sft", "pretrain")}

# fp32: the same arithmetic on the same numbers, so logits must be equal up to this difference. bf16 keeps 8 bits of
# each weight (2^-9 relative), so the likeliest tokens are compared, which must agree at least so often: on random text
# ties are near.
FP32_TOLERANCE = 1e-6
BF16_AGREEMENT = 0.9


class Config(StageConfig):
    """What to export."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the exported weights; bf16 halves the file and rounds."""
    compare_tokens: int = Field(512, ge=16)
    """Random tokens on which the exported model's logits are compared with the training model's."""

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.train import planned_model

        planned_model.check_files(inputs)

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

    from pipeline.data.tokenizer import export_tokenizer
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import cost
    from pipeline.models.build import load, quiet
    from pipeline.models.transformers_4 import add_older_keys
    from pipeline.train import distributed
    from pipeline.train.finetune_data import model_folder

    distributed.setup()
    source = model_folder(inputs["model"])
    trained = load(source).eval()
    tokenizer = load_tokenizer(source)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    with quiet():
        load(source).to(dtype).save_pretrained(output.path)
    add_older_keys(output.path)
    export_tokenizer.write(tokenizer, source, output.path, trained.get_input_embeddings().num_embeddings)
    faults.point("save")

    # The comparison reads the written files, as a user will.
    with quiet():
        exported = AutoModelForCausalLM.from_pretrained(output.path, dtype=dtype, local_files_only=True).eval()
    difference, agreement, num_tokens = compare(trained, exported, len(tokenizer), config)
    faults.point("work")

    loader, remarks = export_tokenizer.readers(output.path)
    for remark in remarks:
        say(f"export: {remark}")
    parameters = cost.count(trained).total
    comparison = (
        f"Weights are {config.dtype}. Compared with the training model on {num_tokens} random tokens: largest"
        f" difference of a logit {difference:.3g}, same likeliest token {agreement:.2%}."
    )
    card = model_card(inputs["model"], ancestry(inputs["model"]), parameters, loader, [comparison, *remarks])
    write_atomic(output.path / "README.md", card)
    return {
        "logit_difference": difference,
        "top1_agreement": agreement,
        "compared_tokens": num_tokens,
        "parameters": parameters,
        "tokenizer_class": loader,
        "summary": {
            "input": f"{inputs['model'].stage}, {parameters / 1e6:.1f} M parameters",
            "output": f"{config.dtype} safetensors, tokenizer, card",
            "measure": f"logits differ by {difference:.1g} on {num_tokens} tokens",
        },
    }


def compare(trained, exported, vocab_size: int, config: Config) -> tuple[float, float, int]:
    """(largest difference of a logit, share of equal likeliest tokens, tokens compared) on random tokens. Raises
    AssertionError if they differ more than the dtype explains."""
    import torch

    generator = torch.Generator().manual_seed(derive(config.seed, "export"))
    length = min(128, trained.config.max_position_embeddings)
    num_rows = max(1, config.compare_tokens // length)
    ids = torch.randint(vocab_size, (num_rows, length), generator=generator)
    with torch.no_grad():
        expected_logits = trained(input_ids=ids).logits.float()
        logits = exported(input_ids=ids).logits.float()
    difference = (expected_logits - logits).abs().max().item()
    agreement = (expected_logits.argmax(-1) == logits.argmax(-1)).float().mean().item()
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
    return difference, agreement, ids.numel()


# ---- the card --------------------------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("export")
