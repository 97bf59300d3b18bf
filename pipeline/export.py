"""Export a model: a folder for `from_pretrained`, verified against the training model, with a card.

    python pipeline/export.py recipes/quickstart.yaml
    python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("runs/quickstart/export/current")'

The folder is also for vLLM, lm-eval, TRL, transformers 4.57 and llama.cpp's converter: safetensors, config, generation
config, tokenizer with chat template. The card says where one of them would read other ids. `gguf: [q8_0]` adds a file
for llama.cpp and Ollama, with a Modelfile.
"""

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import Distinct, PlannedInput, PublishedModel, StageConfig
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.output import Output
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.recipe_file import short_repr
from pipeline.core.seeds import derive
from pipeline.core.terminal import say

# 2: also in the form that transformers 4.57 and llama.cpp's converter read
VERSION = 2
INPUTS = {"model": ("soup", "ppo", "grpo", "dpo", "kto", "sft", "pretrain"), "tokens": ("pack",)}

# fp32: the same arithmetic on the same numbers, so logits must be equal up to this difference. bf16 keeps 8 bits of
# each weight (2^-9 relative), so the likeliest tokens are compared, which must agree at least so often: on random text
# ties are near. fp16 keeps 11 bits.
FP32_TOLERANCE = 1e-6
BF16_AGREEMENT = 0.9
HELDOUT_LENGTH, HELDOUT_ROWS = 512, 64  # on which quantised weights are measured
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Config(StageConfig):
    """What to export."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the exported weights; bf16 and fp16 halve the file and round."""
    shard_size: str = "50GB"
    """Largest file of weights; a model that is larger has several, and an index of them."""
    gguf: Annotated[list[Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k"]], Distinct] = []
    """GGUF files for llama.cpp, Ollama and LM Studio, one for each type of the weights: q8_0 and q4_0 are blocks of 32
    weights in 8 and 4 bits, q4_k blocks of 256 in 4.5. A Modelfile for Ollama names the first. Families: llama,
    mistral, qwen2, qwen3."""
    quantized: Annotated[list[Literal["nf4", "w4a16", "w8a16", "fp8"]], Distinct] = []
    """Folders with quantised weights for transformers and vLLM, each `quantized-FORM` with what it costs: held-out bits
    per byte (with the input `tokens`, by default the recipe's `pack`) and greedy tokens. nf4: 4 bits by bitsandbytes;
    w4a16, w8a16: integers in groups of 128, and fp8: 8-bit floats, by compressed-tensors."""
    compare_tokens: int = Field(512, ge=16)
    """Random tokens on which the exported model's logits are compared with the training model's."""

    @field_validator("shard_size")
    @classmethod
    def _is_size(cls, value: str) -> str:
        if not re.fullmatch("[1-9][0-9]*(KB|MB|GB)", value):
            raise ValueError(f"{short_repr(value)} is not a size; write for example 5GB or 500MB")
        return value

    def optional(self) -> set[str]:
        return {"tokens"}

    def unread(self) -> set[str]:
        return set() if self.quantized or "tokens" in self.inputs else {"tokens"}

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.train import planned_model

        planned_model.check_files({key: model for key, model in inputs.items() if key != "tokens"})
        if self.quantized:
            from pipeline.models import quantized

            config = planned_model.config_of(inputs["model"])
            if config is not None:
                quantized.refuse(config, self.quantized)
        if self.gguf:
            from pipeline.models import gguf_write

            config = planned_model.config_of(inputs["model"])
            if config is not None:
                gguf_write.refuse(config)
                gguf_write.refuse_types(config, self.gguf)

    def check_machine(self) -> None:
        if self.gguf:
            from pipeline.models.gguf_file import require_library

            require_library()
        if self.quantized:
            from pipeline.models.quantized import require_libraries

            require_libraries(self.quantized)

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

    from pipeline.core import distributed
    from pipeline.data.tokenizer import export_tokenizer
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import cost
    from pipeline.models.build import load, quiet
    from pipeline.models.model_card import ancestry, model_card
    from pipeline.models.transformers_4 import add_older_keys
    from pipeline.train.finetune_data import model_folder

    distributed.setup()
    source = model_folder(inputs["model"])
    trained = load(source).eval()
    tokenizer = load_tokenizer(source)
    dtype = DTYPES[config.dtype]
    with quiet():
        rounded = load(source).to(getattr(torch, dtype))
        check_finite(rounded, config.dtype)
        rounded.save_pretrained(output.path, max_shard_size=config.shard_size)
        del rounded
    add_older_keys(output.path)
    export_tokenizer.write(tokenizer, source, output.path, trained.get_input_embeddings().num_embeddings)
    faults.point("save")

    # The comparison reads the written files, as a user will.
    with quiet():
        exported = AutoModelForCausalLM.from_pretrained(output.path, dtype=dtype, local_files_only=True).eval()
    comparison = compare(trained, exported, len(tokenizer), config)
    check(comparison, config.dtype)
    del exported
    faults.point("work")

    loader, remarks = export_tokenizer.readers(output.path)
    before = None
    if config.quantized or "tokens" in inputs:
        before = reference_of(trained, inputs, config)
    files = write_gguf(trained, output.path, config, before)
    remarks += files.remarks
    for remark in remarks:
        say(f"export: {remark}")
    parameters = cost.count(trained).total
    variants = write_quantized(trained, output.path, config, before)
    paragraph = (
        f"Weights are {config.dtype}. Compared with the training model on {comparison.num_tokens} random tokens:"
        f" largest difference of a logit {comparison.difference:.3g}, same likeliest token {comparison.agreement:.2%}."
    )
    card = model_card(
        inputs["model"],
        ancestry(inputs["model"]),
        parameters,
        loader,
        [paragraph, *files.paragraphs, *variants.paragraphs, *remarks],
    )
    write_atomic(output.path / "README.md", card)
    written = f"{config.dtype} safetensors, tokenizer, card"
    metrics = {
        "logit_difference": comparison.difference,
        "top1_agreement": comparison.agreement,
        "compared_tokens": comparison.num_tokens,
        "parameters": parameters,
        "tokenizer_class": loader,
        "summary": {
            "input": f"{inputs['model'].stage}, {parameters / 1e6:.1f} M parameters",
            "output": ", ".join([written, *files.names, *variants.names]),
            "measure": f"logits differ by {comparison.difference:.1g} on {comparison.num_tokens} tokens",
        },
    }
    if config.gguf:
        metrics["gguf"] = files.metrics
    if config.quantized:
        metrics["quantized"] = variants.metrics
    return metrics


# ---- quantised folders -----------------------------------------------------------------------------------------------


@dataclass
class Variants:
    """Folders with quantised weights."""

    names: list[str] = field(default_factory=list)
    metrics: dict[str, dict] = field(default_factory=dict)
    """Of each form, what it costs."""
    paragraphs: list[str] = field(default_factory=list)
    """For the card."""


def write_quantized(trained, folder: Path, config: Config, before) -> Variants:
    """The quantised folders that the recipe asks for, each read again and measured against the training model. folder:
    the exported one; before: quality_loss.Reference."""
    variants = Variants()
    if not config.quantized:
        return variants
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.assessment import quality_loss
    from pipeline.models import quantized
    from pipeline.models.build import quiet

    quantized.refuse(trained.config, config.quantized)
    dtype = getattr(torch, DTYPES[config.dtype])
    for form in config.quantized:
        target = folder / f"quantized-{form}"
        with quiet():
            quantized.write(folder, form, target, dtype)
            model = AutoModelForCausalLM.from_pretrained(target, local_files_only=True, device_map={"": "cpu"}).eval()
        figures = quality_loss.loss_of(model, before)
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        variants.names.append(target.name)
        variants.metrics[form] = figures | {"bytes": size}
        variants.paragraphs.append(
            f"`{target.name}/` ({quantized.FORMS[form].about}, {size / 1e6:,.1f} MB): {quality_loss.sentence(figures)}."
        )
        say(f"export: {form}: {quality_loss.sentence(figures)}")
        del model
    return variants


def reference_of(trained, inputs: dict[str, Artifact], config: Config):
    """What the training model does with held-out text, or without packed tokens with random tokens."""
    import torch

    from pipeline.assessment import quality_loss
    from pipeline.assessment.inputs import check_tokens, plain_candidate
    from pipeline.data.tokens.heldout_rows import heldout_rows

    positions = trained.config.max_position_embeddings
    rows = []
    if "tokens" in inputs:
        check_tokens(inputs["tokens"], [plain_candidate(inputs["model"])])
        rows = heldout_rows(inputs["tokens"].path, min(HELDOUT_LENGTH, positions), HELDOUT_ROWS)
    length = quality_loss.PREFIX
    if rows:
        beginnings = [row.tokens[:length].tolist() for row in rows[: quality_loss.MOST_TEXTS]]
    else:
        generator = torch.Generator().manual_seed(derive(config.seed, "quantized"))
        size = (quality_loss.MOST_TEXTS, length)
        beginnings = torch.randint(trained.config.vocab_size, size, generator=generator).tolist()
    return quality_loss.reference(trained, beginnings, rows)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@dataclass
class GgufFiles:
    """What was written for llama.cpp."""

    names: list[str] = field(default_factory=list)
    metrics: dict[str, dict] = field(default_factory=dict)
    """Of each type, its difference from the training model."""
    paragraphs: list[str] = field(default_factory=list)
    """For the card."""
    remarks: list[str] = field(default_factory=list)


def write_gguf(trained, folder: Path, config: Config, before) -> GgufFiles:
    """The GGUF files that the recipe asks for, each read again and compared, and a Modelfile for the first. folder: the
    exported one, with tokenizer and generation settings; before: quality_loss.Reference, or None."""
    from pipeline.assessment import quality_loss
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import gguf_write, ollama
    from pipeline.models.publish import generation_settings, stop_ids

    files = GgufFiles()
    if not config.gguf:
        return files
    gguf_write.refuse_types(trained.config, config.gguf)
    tokenizer = load_tokenizer(folder)
    ends = stop_ids(folder, tokenizer)
    copied = copy.deepcopy(trained)
    for weight_type in config.gguf:
        path = folder / f"model-{weight_type}.gguf"
        remarks = gguf_write.write(trained, folder, path, weight_type, ends)
        files.remarks += [remark for remark in remarks if remark not in files.remarks]
        copied.load_state_dict(gguf_write.read_weights(path, trained.config), strict=False)
        comparison = compare(trained, copied, len(tokenizer), config)
        if weight_type == "f32":
            check(comparison, "fp32")
        files.names.append(path.name)
        files.metrics[weight_type] = {
            "logit_difference": comparison.difference,
            "top1_agreement": comparison.agreement,
            "kl": comparison.kl,
            "bytes": path.stat().st_size,
        }
        files.paragraphs.append(
            f"`{path.name}` for llama.cpp ({path.stat().st_size / 1e6:,.1f} MB): same likeliest token"
            f" {comparison.agreement:.2%}, KL divergence from the training model {comparison.kl:.2g} nats per token."
        )
        if before is not None:
            figures = quality_loss.loss_of(copied, before)
            files.metrics[weight_type] |= figures
            files.paragraphs[-1] += f" With its weights {quality_loss.sentence(figures)}."
    text, remarks = ollama.modelfile(
        files.names[0],
        tokenizer,
        generation_settings(folder, tokenizer),
        ends,
        gguf_write.adds_bos(folder / files.names[0]),
    )
    write_atomic(folder / "Modelfile", text)
    files.paragraphs.append("With Ollama: `ollama create NAME -f Modelfile`.")
    files.remarks += remarks
    return files


# ---- comparisons -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two models on the same random tokens."""

    difference: float
    """Largest, of a logit."""
    agreement: float
    """Share of places with the same likeliest token."""
    kl: float
    """Mean KL divergence of the next token's distribution from the training model's, nats."""
    num_tokens: int


def check_finite(model, dtype: str) -> None:
    """Raise UserError for weights that have become infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"dtype: {dtype} cannot hold all weights of {name} (its largest is 65,504); use bf16")


def compare(trained, exported, vocab_size: int, config: Config) -> Comparison:
    """Logits of two models on random tokens."""
    import torch

    generator = torch.Generator().manual_seed(derive(config.seed, "export"))
    length = min(128, trained.config.max_position_embeddings)
    num_rows = max(1, config.compare_tokens // length)
    ids = torch.randint(vocab_size, (num_rows, length), generator=generator)
    with torch.no_grad():
        expected_logits = trained(input_ids=ids).logits.float()
        logits = exported(input_ids=ids).logits.float()
    expected_logprobs, logprobs = expected_logits.log_softmax(-1), logits.log_softmax(-1)
    return Comparison(
        difference=(expected_logits - logits).abs().max().item(),
        agreement=(expected_logits.argmax(-1) == logits.argmax(-1)).float().mean().item(),
        kl=(expected_logprobs.exp() * (expected_logprobs - logprobs)).sum(-1).mean().item(),
        num_tokens=ids.numel(),
    )


def check(comparison: Comparison, dtype: str) -> None:
    """Raise AssertionError if the exported model differs more than its dtype explains."""
    if dtype == "fp32" and comparison.difference > FP32_TOLERANCE:
        raise AssertionError(
            f"the exported model's logits differ from the training model's by {comparison.difference:g}, more than"
            f" {FP32_TOLERANCE:g}"
        )
    if comparison.agreement < BF16_AGREEMENT:
        raise AssertionError(
            f"the exported model's likeliest token is the training model's in {comparison.agreement:.1%} of"
            f" {comparison.num_tokens} places, expected {BF16_AGREEMENT:.0%}"
        )


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("export")
