"""The steps that sft, reward, dpo, kto and ppo share, in the order in which a stage takes them.

    parent = load_parent(config, inputs["model"], output.stage)       # folder, tokenizer and chat template
    arrays, extra = encode_once(output, config, encode)               # finetune_data.py: records become token rows
    model, weights = load_model(config, parent)                       # in parts, if a process keeps only one
    adapt(config, parent, model, weights)                             # with `lora`
    engine, expected = build_engine(model, loss, config, work, weights=weights)     # says what will be computed
    result = fit(engine, config, output, expected, rows, heldout, collate)
    publish_model(engine, config, parent, output)
    return summarise(config, output, result, ...)

A stage adds its loss, how its records become rows and batches, and what it says of the result.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.core import distributed
from pipeline.core.artifact import Artifact, digest_of
from pipeline.core.errors import UserError
from pipeline.core.intervals import warn
from pipeline.core.output import Output
from pipeline.core.terminal import plural, say
from pipeline.data.chat import named_templates
from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer, use_known_padding
from pipeline.models import build, cost, families, frozen, lora, vocabulary
from pipeline.models.folder_weights import FolderWeights
from pipeline.models.weights_hash import weights_hash
from pipeline.train import engine as engines
from pipeline.train import layers, loop, train_length
from pipeline.train.best import Selection
from pipeline.train.engine import Engine, Loss, Read
from pipeline.train.finetune_config import FinetuneConfig
from pipeline.train.finetune_data import Arrays, Counts, ShuffledRows, by_length, heldout_share, model_folder
from pipeline.train.layouts import starts_in_parts
from pipeline.train.metrics import Expected, total_peak
from pipeline.train.publish_adapted import publish_adapted
from pipeline.train.record_order import Groups, MixedRecords, Records
from pipeline.train.reference_logprobs import Cache
from pipeline.train.run_summary import Work, tuning_lines

# ---- load ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parent:
    """The model that a stage starts from, on disk, and how it reads text."""

    folder: Path
    tokenizer: Any
    """PreTrainedTokenizerFast, with a padding token that the model has an embedding for."""
    chat: Chat
    new_tokens: dict[int, list[int]]
    """Tokens of the recipe's chat template that the folder's tokenizer lacks: id -> ids of what their text was."""

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def load(self, head: str = "causal", config=None):
        """The model, with rows for new tokens. config: instead of the folder's."""
        if config is not None and self.new_tokens:
            config.vocab_size = self._vocab_size()
        model = build.load(self.folder, head=head, config=config)
        vocabulary.add_rows(model, self.new_tokens)
        return model

    def skeleton(self, head: str = "causal", config=None) -> tuple[Any, FolderWeights | None]:
        """The model on the meta device, with rows for new tokens, and what fills it part by part; the model complete
        and None for a folder that can only be read as a whole (build.skeleton). config: instead of the folder's."""
        if config is not None and self.new_tokens:
            config.vocab_size = self._vocab_size()
        model, weights = build.skeleton(self.folder, head=head, config=config)
        vocabulary.add_rows(model, self.new_tokens)
        if weights is not None:
            weights.new_rows = self.new_tokens
        return model, weights

    def _vocab_size(self) -> int:
        """Rows of the folder's embedding."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]

    def tokenizer_files(self, config: FinetuneConfig, output: Output) -> Path:
        """The folder of the tokenizer to publish with the model."""
        if config.chat_template is None and not config.chat_template_kwargs:
            return self.folder
        folder = output.path / "work" / "tokenizer"
        named_templates.save_tokenizer(self.tokenizer, self.folder, folder, bool(self.new_tokens))
        return folder


def load_parent(config: FinetuneConfig, artifact: Artifact, name: str) -> Parent:
    """Tokenizer and chat template of a model. name: of the stage or model, for messages. Raises UserError for a folder,
    a tokenizer or a template that the stage cannot use."""
    folder = model_folder(artifact)
    tokenizer = tokenizer_of(folder, config.sequence_length)
    tokenizer, new_tokens = named_templates.with_template(tokenizer, config.chat_template, config.chat_template_kwargs)
    if new_tokens:
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(list(new_tokens)))
        say(f"{name}: the chat template's tokens {tokens} are added to the tokenizer and to the model")
    chat = Chat(tokenizer, date=config.date)
    if chat.writes_date and config.date is None:
        say(f"{name}: the chat template writes today's date; {chat.date} is used in every row (key `date`)")
    if config.date is not None and not chat.writes_date:
        say(f"{name}: WARNING: date: {config.date} has no effect: the chat template writes no date; remove it")
    return Parent(folder, tokenizer, chat, new_tokens)


def tokenizer_of(folder: Path, sequence_length: int):
    """The tokenizer in a model's folder, with a padding token that the model has an embedding for. Raises UserError if
    the model cannot take rows of `sequence_length` tokens, or has no embedding for tokens that rows may contain."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder}: contains no model with a tokenizer (config.json, tokenizer_config.json); expected a folder in"
            " the Hugging Face layout"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    most = families.positions(config)
    if most and sequence_length > most:
        raise UserError(
            f"sequence_length: {sequence_length} is more than the {most} positions of the model"
            f" (max_position_embeddings); use at most {most}"
        )
    tokenizer = load_tokenizer(folder)
    _check_embedding(folder, tokenizer, config.vocab_size)
    use_known_padding(tokenizer, config.vocab_size)
    return tokenizer


def _check_embedding(folder: Path, tokenizer, rows: int) -> None:
    """Raise UserError for a token that rows may contain and whose id is beyond the `rows` of the model's embedding:
    tokens of text, and added ones that the chat template writes."""
    added = tokenizer.added_tokens_decoder
    template = tokenizer.chat_template or ""
    written = template if isinstance(template, str) else "".join(template.values())
    own = (tokenizer.bos_token, tokenizer.eos_token)
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index < rows:
            continue
        if index in added and token not in own and token not in written:
            continue
        raise UserError(
            f"{folder}: its tokenizer has {token!r} with id {index}, and the model's embedding has {rows} rows; a token"
            " that was added needs a row (model.resize_token_embeddings(len(tokenizer)), then save both); otherwise the"
            " tokenizer belongs to another model"
        )


def reference_cache(config: FinetuneConfig, parent: Parent, artifact: Artifact, output: Output) -> Cache:
    """Where the log-probabilities of the model that a stage starts from are kept. Collective."""
    depends_on = None
    if output.is_main:
        new_tokens = {str(index): pieces for index, pieces in parent.new_tokens.items()}
        depends_on = {
            "weights": _weights_digest(parent, artifact),
            "kept": config.lora.base if config.lora else "fp32",
            "new_tokens": new_tokens,
            "precision": config.precision,
        }
    return Cache(output.folder.parent / "cache", distributed.from_main(depends_on))


def _weights_digest(parent: Parent, artifact: Artifact) -> str:
    """Digest of the files of the model that a stage starts from; of an adapter, with a hash of its base model."""
    files = {}
    for name, entry in artifact.manifest["files"].items():
        if (artifact.path / name).is_relative_to(parent.folder):
            files[name] = entry
    if not lora.is_adapter(parent.folder):
        return digest_of(files)
    return f"{digest_of(files)} {weights_hash(lora.base_of(parent.folder))}"


def records_of(config: FinetuneConfig, arrays: Arrays, count: int) -> Records:
    """What the epochs of a run over `count` records are made of. Raises UserError for a source that has a weight and
    no records to train on."""
    if config.mixture is None:
        return Records(config.seed, count)
    source_of = arrays["train.source"]
    for number, name in enumerate(config.sources):
        if config.mixture[name] and not np.any(source_of == number):
            raise UserError(
                f"stage {config.kind}: mixture: none of the records of {name} is left to train on (report.json says"
                " why); give it the weight 0"
            )
    return MixedRecords(config.seed, source_of, [config.mixture[name] for name in config.sources])


def shuffled_rows(config: FinetuneConfig, arrays: Arrays, lengths: np.ndarray) -> ShuffledRows:
    """The order of rows over a run. lengths: tokens of each row to train on, by which `group_by_length` groups them."""
    records = records_of(config, arrays, len(lengths))
    groups = Groups(lambda row: int(lengths[row]), config.batch_size) if config.group_by_length else None
    return ShuffledRows(config.seed, records.count, records, groups)


def in_steps(config: FinetuneConfig, rows: int) -> FinetuneConfig:
    """The config of a run over epochs of `rows` rows, with its length in steps. Raises UserError if other keys do not
    fit that length."""
    resolved = config.in_steps(rows)
    resolved.check(distributed.world())
    train_length.say_warnings(config, resolved)
    return resolved


# ---- build -----------------------------------------------------------------------------------------------------------


def load_model(config: FinetuneConfig, parent: Parent, head: str = "causal") -> tuple[Any, FolderWeights | None]:
    """(the model that a stage starts from, what `build_engine` fills it with). Where a process keeps only a part of it,
    and on GPUs, it stays on the meta device until the engine reads part after part; otherwise it is complete, and there
    is nothing to fill."""
    if not starts_in_parts(config):
        return parent.load(head=head), None
    return parent.skeleton(head)


def adapt(
    config: FinetuneConfig, parent: Parent, model, weights: FolderWeights | None = None, complete: tuple[str, ...] = ()
) -> None:
    """With `lora`, freeze the model, keep its weights as `lora.base` says and give it adapters; `complete` names
    modules that are trained as they are. weights: what the model will be filled with."""
    if config.lora is None:
        return
    if config.lora.publish == "adapter" and lora.is_adapter(parent.folder):
        raise UserError(
            f"stage {config.kind}: lora.publish: adapter needs a complete model to start from, and {parent.folder} is"
            " an adapter itself; use publish: merged here, or in the stage that made it"
        )
    if config.lora.publish == "adapter" and parent.new_tokens:
        raise UserError(
            f"stage {config.kind}: lora.publish: adapter cannot hold the rows of the tokens that chat_template adds;"
            " use publish: merged"
        )
    frozen.store(model, config.lora.base, config.precision, distributed.device(), complete)
    lora.attach(model, config.lora, config.seed, complete)
    if weights is not None and config.lora.base == "nf4":
        weights.then.append(lambda part, _: frozen.quantise(part, distributed.device()))
    if weights is not None:
        weights.then.append(lambda part, global_name: lora.initialise(part, config.seed, global_name))
    if families.num_experts(model.config):
        say(f"{config.kind}: lora: routed experts get no adapter and stay as they are; linear layers have one")


def build_engine(
    model,
    loss: Loss,
    config: FinetuneConfig,
    work: Work,
    name: str = "model",
    weights: FolderWeights | None = None,
    **losses,
) -> tuple[Engine, Expected]:
    """Print what the stage will compute and how long that may take, then build the engine of the model. Returns the
    engine and the expected time for the meters. Collective.

    weights: what fills a model on the meta device. losses: as for layers.prepare. Families for which chunks were not
    verified give logits to `loss`.
    """
    layers.prepare(model, config, **losses)
    size = cost.count(model)
    flops = cost.training_flops(model, size, config.sequence_length)
    peak = total_peak(config)
    for line in tuning_lines(config, model, size, flops, peak, work):
        say(line)
    engine = engines.build(model, loss, config, name=name, fill=weights)
    if weights is not None and config.lora is not None:
        check_adapters(engine)
    return engine, Expected(seconds=work.seconds(flops, peak))


def check_adapters(engine: Engine) -> None:
    """Raise UserError if an adapter would be ignored, for a model that could not be called before. Collective."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    batch = {"inputs": {"input_ids": ids}, "labels": ids, "weight": 2.0}
    with lora.checking_calls(engine.model), torch.compiler.set_stance("force_eager"):
        engine.forward([batch], lambda *_: torch.zeros(()))


# ---- fit -------------------------------------------------------------------------------------------------------------


class RowOrder(Protocol):
    """The order of rows over a run: ShuffledRows or PackedRows (finetune_data.py)."""

    per_epoch: int

    def at(self, index: int) -> Any:
        """The row at a global index of the run."""

    def taken(self, num_rows: int) -> np.ndarray:
        """How often each record is taken in the first `num_rows` rows of the run."""


def fit(
    engine: Engine,
    config: FinetuneConfig,
    output: Output,
    expected: Expected,
    rows: RowOrder,
    heldout: dict[str, Sequence],
    collate: Callable[[str, list], dict],
    *,
    unit: str = "tok",
    read: Read | None = None,
    measure: Callable[[], dict] | None = None,
    length: Callable[[str, Any], int] | None = None,
    prepare: Callable[[str, list[list], list[dict]], None] | None = None,
    before_step: Callable[[list[list[tuple[int, Any]]]], None] | None = None,
) -> dict:
    """Train an engine on `rows`, and evaluate it on each set of held-out rows (heldout_sets): metrics of the set NAME
    are called loss/NAME, ... Returns what `loop.run` does. Collective.

    collate(split, rows) makes a micro-batch of rows of "train" or "heldout"; read(outputs, batch) gives what is kept of
    each held-out record, before and after, for the interval of the difference; measure() gives further numbers for an
    evaluation; `unit` names what the loss is averaged over. length(split, row): rows of like length share a micro-batch
    of this process, so that little is padded. prepare(split, rows of each micro-batch, micro-batches) is called before
    the micro-batches of a step or an evaluation are used, with the weights that these will see. Collective.
    before_step(rows of each micro-batch, with their numbers in the run) is called before each step.
    """
    sets = {}
    for name, own in heldout.items():
        sets[name] = _heldout_batches(own, name, config, engine, collate, length)
    records = [record for part in sets[""].rows for row in part for record in np.atleast_1d(row).tolist()]

    def batches(step: int) -> list[dict]:
        numbered = [[(index, rows.at(index)) for index in indices] for indices in loop.share(config, engine, step)]
        if length is not None:
            numbered = by_length(numbered, lambda entry: length("train", entry[1]))
        if before_step is not None:
            before_step(numbered)
        parts = [[row for _, row in part] for part in numbered]
        micro_batches = [collate("train", part) for part in parts]
        if prepare is not None:
            prepare("train", parts, micro_batches)
        return micro_batches

    def evaluate() -> dict:
        if prepare is not None:
            for own in sets.values():
                prepare("heldout", own.rows, own.batches)
        numbers = engine.evaluate(sets[""].batches, read)
        if read is not None:
            numbers["rows"] = _in_order(records, torch.cat(numbers.pop("results")))
        for name, own in sets.items():
            if name:
                means = engine.evaluate(own.batches)
                numbers |= {f"{key}/{name}": value for key, value in means.items() if key != "weight"}
        return numbers | measure() if measure else numbers

    selection = None if config.best is None else Selection(config.best, config.kind)
    return loop.fit(
        engine,
        config,
        output,
        batches,
        evaluate=evaluate,
        unit=unit,
        expected=expected,
        selection=selection,
        average=config.average,
    )


@dataclass(frozen=True)
class HeldoutBatches:
    """Micro-batches of held-out rows of this process, and the rows of each."""

    rows: list[list]
    batches: list[dict]


def _heldout_batches(
    heldout: Sequence,
    name: str,
    config: FinetuneConfig,
    engine: Engine,
    collate: Callable[[str, list], dict],
    length: Callable[[str, Any], int] | None,
) -> HeldoutBatches:
    rows = [[heldout[index] for index in part] for part in heldout_share(len(heldout), config, engine, name)]
    if length is not None:
        rows = by_length(rows, functools.partial(length, "heldout"))
    return HeldoutBatches(rows, [collate("heldout", part) for part in rows])


def _in_order(records: list[int], values: torch.Tensor) -> list:
    """What all processes read of their held-out records, in the order of the records. Collective."""
    pairs = distributed.all_gather_lists(list(zip(records, values.tolist(), strict=True)))
    return [value for _, value in sorted(pairs)]


# ---- publish and summarise -------------------------------------------------------------------------------------------


def publish_model(engine: Engine, config: FinetuneConfig, parent: Parent, output: Output) -> Path:
    """Write the trained model to model/, with the parent's tokenizer files. Returns that folder. Collective."""
    folder = output.path / "model"
    if config.lora is not None:
        weights = engine.trained_weights()
        if output.is_main:
            publish_adapted(engine.model, weights, config, parent, output)
        return folder
    tokenizer_folder = parent.tokenizer_files(config, output) if output.is_main else parent.folder
    engine.publish(engine.model.config, tokenizer_folder, folder, parent.folder)
    return folder


def say_counts(output: Output, counts: Counts, detail: str = "") -> None:
    say(
        f"{output.stage}: {plural(counts.train, counts.noun)} to train on{detail}, {counts.heldout} held out;"
        f" {plural(counts.rejected, 'record')} dropped (the reasons are in report.json)"
    )


def say_sources(config: FinetuneConfig, arrays: Arrays, rows: RowOrder) -> None:
    """How often a run will take the records of each source, if there are several."""
    taken = sources_taken(config, arrays, rows, config.steps)
    total = sum(source["taken"] for source in taken.values())
    parts = []
    for name, source in taken.items():
        share, epochs = source["taken"] / total, source["taken"] / max(1, source["records"])
        parts.append(f"{name} {share:.1%}, {epochs:.2f} epochs of {source['records']:,}")
    if len(parts) > 1:
        say(f"sources    {'; '.join(parts)}")


def sources_taken(config: FinetuneConfig, arrays: Arrays, rows: RowOrder, steps: int) -> dict[str, dict]:
    """Of each source, the number of records to train on, and how many records the first steps of a run take, a record
    counting as often as it is taken."""
    if "train.source" not in arrays:  # rows of an older version, whose run was interrupted
        return {}
    source_of, counts = arrays["train.source"], rows.taken(steps * config.batch_size)
    numbers = {}
    for number, name in enumerate(config.sources):
        own = counts[source_of == number]
        numbers[name] = {"records": len(own), "taken": int(own.sum())}
    return numbers


def before_and_after(result: dict, prefix: str = "") -> dict:
    """The evaluations before the first and after the last step, as metrics of the stage."""
    metrics = {}
    for when in ("before", "after"):
        for key, value in result[when].items():
            if key != "weight":
                metrics[f"{prefix}{key}_{when}"] = value
    return metrics


def summarise(
    config: FinetuneConfig,
    output: Output,
    result: dict,
    rows: RowOrder,
    counts: Counts,
    *,
    unit: str,
    measures: list[str],
    nothing: list[str],
    arrays: Arrays,
) -> dict:
    """The metrics of a stage that `fit` has trained. unit: what its rate counts; measures: parts of the closing line;
    nothing: what shows that nothing was learned."""
    metrics = before_and_after(result, "heldout_")
    for name in config.evaluate:
        before, after = (result[when][f"loss/{name}"] for when in ("before", "after"))
        measures.append(f"{name} {before:.3f} -> {after:.3f}")
    metrics["warnings"] = warn(output.stage, nothing)
    metrics["train_loss"] = result["last"]["loss"]
    metrics[f"train_{counts.noun}s"] = counts.train
    metrics[f"heldout_{counts.noun}s"] = counts.heldout
    metrics["rejected"] = counts.rejected
    metrics["epochs"] = result["steps"] * config.batch_size / rows.per_epoch
    published = result["steps"]
    if "best" in result:
        published = result["best"]["step"]
        metrics |= {"steps": result["steps"], "best_step": published}
    if "average" in result:
        metrics["average"] = result["average"]
    metrics["sources"] = sources_taken(config, arrays, rows, result["steps"])
    metrics[f"{unit}_per_second"] = result["rate"]
    metrics["summary"] = {
        "input": f"{plural(len(config.sources), 'source')}, {plural(counts.train + counts.heldout, counts.noun)}",
        "output": f"model/, {plural(published, 'step')}",
        "measure": ", ".join(measures),
    }
    return metrics
