"""What SFT, reward modelling and DPO share: token rows made once and read by every process, and which rows a step
takes."""

import functools
import json
import shutil
from bisect import bisect_left, insort
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.files import sync_tree, write_json
from pipeline.core.output import Output
from pipeline.core.plural import many
from pipeline.core.seeds import derive
from pipeline.models import cost
from pipeline.train import distributed, phases
from pipeline.train.heartbeat import wait_for
from pipeline.train.metrics import Text, total_peak
from pipeline.train.run_summary import Work, tuning_lines

SPLITS = ("train", "heldout")


def model_folder(artifact: Artifact) -> Path:
    """Where a stage's output, or a folder made elsewhere, holds its model."""
    return artifact.path / "model" if (artifact.path / "model").is_dir() else artifact.path


def tokenizer_of(folder: Path, sequence_length: int):
    """The tokenizer in a model's folder, with a padding token that the model knows. Raises UserError if the model
    cannot take rows of `sequence_length` tokens, or has no embedding for tokens that rows would have."""
    from transformers import AutoConfig

    from pipeline.data.tokens.store import load_tokenizer, use_known_padding
    from pipeline.models.families import positions

    if not (folder / "config.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder}: holds no model with its tokenizer (config.json, tokenizer_config.json); expected a folder in"
            " the Hugging Face layout"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    most = positions(config)
    if most and sequence_length > most:
        raise UserError(
            f"sequence_length: {sequence_length} is more than the {most} positions of the model"
            f" (max_position_embeddings); use at most {most}"
        )
    tokenizer = load_tokenizer(folder)
    rows = config.vocab_size
    _check_embedding(folder, tokenizer, rows)
    use_known_padding(tokenizer, rows)
    return tokenizer


def _check_embedding(folder: Path, tokenizer, rows: int) -> None:
    """Raise UserError for a token that rows would have and that lies beyond the `rows` of the model's embedding:
    tokens of text, and added ones that the chat template writes."""
    added = tokenizer.added_tokens_decoder
    template = tokenizer.chat_template or ""
    written = template if isinstance(template, str) else "".join(template.values())
    own = (tokenizer.bos_token, tokenizer.eos_token)
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if index < rows or index in added and token not in own and token not in written:
            continue
        raise UserError(
            f"{folder}: its tokenizer has {token!r} with id {index}, and the model's embedding has {rows} rows; a token"
            " that was added needs a row (model.resize_token_embeddings(len(tokenizer)), then save both); otherwise the"
            " tokenizer belongs to another model"
        )


def chat_of(tokenizer, config, stage: str):
    """The tokenizer's chat template, with the date of the stage's config. Says so if the template asks for it."""
    from pipeline.core.chain import say
    from pipeline.data.chat.template import Chat

    chat = Chat(tokenizer, date=config.date)
    if chat.writes_date and config.date is None:
        say(f"{stage}: the chat template writes today's date; {chat.date} is written in every row (key `date`)")
    return chat


def announce(config, model, work: Work) -> Text:
    """Say what the stage is about to do and how long it may take. `model`: before an engine has wrapped it.
    Collective. Returns what the meters compare their times with."""
    from pipeline.core.chain import say

    size, flops = cost.count(model), cost.training_flops(model, cost.count(model), config.sequence_length)
    peak = total_peak(config)
    for line in tuning_lines(config, model.config, size, flops, peak, work):
        say(line)
    return Text(expected=work.seconds(flops, peak))


# ---- rows ------------------------------------------------------------------------------------------------------------


class Ragged:
    """Rows of different lengths in one array: row i is values[starts[i]:starts[i + 1]]."""

    def __init__(self, values: np.ndarray, starts: np.ndarray):
        self.values, self.starts = values, starts

    @classmethod
    def of(cls, rows: list[list[int]], dtype) -> "Ragged":
        starts = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
        values = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)
        return cls(values, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


def shared(
    output: Output, config, build: Callable[[], tuple[dict[str, "Ragged | np.ndarray"], dict]]
) -> tuple[dict, dict]:
    """(arrays, JSON) that the main process builds once and that all processes then read from `work/`, memory-mapped.
    Starts the process group.

    The group is started after building, so that a mistake in the data is one sentence from the main process, while the
    others still wait.
    """
    folder = output.path / "work" / "rows"
    if not output.is_main:
        wait_for(folder)
    elif not folder.exists():
        phases.enter("prepare")
        temporary = folder.with_name("rows.tmp")
        if temporary.exists():  # of a run that was killed while writing
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        arrays, extra = build()
        for name, array in arrays.items():
            parts = (
                {f"{name}.values": array.values, f"{name}.starts": array.starts}
                if isinstance(array, Ragged)
                else {name: array}
            )
            for part, values in parts.items():
                np.save(temporary / f"{part}.npy", values)
        write_json(temporary / "extra.json", extra)
        sync_tree(temporary)
        faults.point("save")
        temporary.rename(folder)
        output.note_time()
    phases.enter("start")
    distributed.setup(config)
    distributed.barrier()
    loaded = {path.name.removesuffix(".npy"): np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    arrays = {name: array for name, array in loaded.items() if not name.endswith((".values", ".starts"))}
    arrays |= {
        name.removesuffix(".starts"): Ragged(loaded[name.replace(".starts", ".values")], array)
        for name, array in loaded.items()
        if name.endswith(".starts")
    }
    return arrays, json.loads((folder / "extra.json").read_text(encoding="utf-8"))


# ---- which rows a step takes -----------------------------------------------------------------------------------------


@functools.lru_cache(4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of `count` rows in an epoch: a function of (seed, epoch). Not to be changed."""
    return np.random.Generator(np.random.PCG64(derive(seed, "epoch", epoch))).permutation(count)


def row_at(seed: int, index: int, count: int) -> int:
    """The row that stands at a global index, epoch after epoch."""
    return int(permutation(seed, index // count, count)[index % count])


def best_fit(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Items into as few rows as best-fit decreasing finds: longest first, each into the fullest row that has room (Ding
    et al., 2024). `order` breaks ties.

    Within 11/9 of the fewest rows possible (Johnson, 1974); the number of rows does not depend on `order`.
    """
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # room -> rows
    rooms: list[int] = []  # the keys of `free`, sorted
    for item in order[np.argsort(-lengths[order], kind="stable")]:
        length = int(lengths[item])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = free[room].pop()
            if not free[room]:
                del free[room], rooms[at]
        rows[row].append(int(item))
        left = room - length
        if left not in free:
            free[left] = []
            insort(rooms, left)
        free[left].append(row)
    return rows


def heldout_share(count: int, config, engine) -> list[np.ndarray]:
    """Held-out rows of this process, a micro-batch each. Raises UserError if there are fewer rows than processes."""
    if count < engine.data_world:
        raise UserError(
            f"stage {config.kind}: {count} held-out rows cannot be shared by {engine.data_world} processes; hold out"
            f" more (holdout: {config.holdout})"
        )
    mine = np.arange(engine.data_rank, count, engine.data_world)
    micro = config.micro_batch or config.batch_size // engine.data_world
    return [mine[start : start + micro] for start in range(0, len(mine), micro)]


# ---- pairs -----------------------------------------------------------------------------------------------------------


def encode_pairs(
    pairs: list, split: str, chat, sequence_length: int, ledger, margins: bool = True
) -> dict[str, "Ragged | np.ndarray"]:
    """Token rows of pairs: `chosen` and `rejected` (prompt and answer, up to the end of the turn), `start` (where the
    answer begins), `margin`.

    A pair that is longer than sequence_length is left out whole: a cut answer is another answer than the one that was
    preferred. With `margins` false a pair that has a margin is left out, because the loss could not keep it.
    """
    both = chat.encode(
        [
            [*pair.prompt, {"role": "assistant", "content": answer}]
            for pair in pairs
            for answer in (pair.chosen, pair.rejected)
        ]
    )
    rows, reasons = [], []
    for pair, chosen, rejected in zip(pairs, both[::2], both[1::2], strict=True):
        reason = next((found for found in (chosen, rejected) if isinstance(found, str)), None)
        if reason is None and pair.margin and not margins:
            reason = "has a margin, which this loss does not know; give the source `ignore: [margin]`"
        if reason is None and max(len(chosen.ids), len(rejected.ids)) > sequence_length:
            reason = "longer than sequence_length"
        if reason is None and chosen.ids == rejected.ids:
            reason = "chosen and rejected are the same tokens"
        if reason is None and chosen.ids[: chosen.start] != rejected.ids[: rejected.start]:
            reason = "the chat template writes its prompt in two ways"
        reasons.append(reason)
        if reason is None:
            rows.append((chosen.ids, rejected.ids, chosen.start))
    kept = ledger.keep(pairs, split, reasons)
    return {
        f"{split}.chosen": Ragged.of([row[0] for row in rows], np.int32),
        f"{split}.rejected": Ragged.of([row[1] for row in rows], np.int32),
        f"{split}.start": np.array([row[2] for row in rows], np.int64),
        f"{split}.margin": np.array([pair.margin for pair in kept], np.float32),
    }


def pair_work(config, arrays: dict, reference: bool = False) -> Work:
    """What a stage that learns from pairs computes. `reference`: each pair that is used is also measured once with the
    weights that the stage starts from."""
    lengths = {split: arrays[f"{split}.chosen"].lengths + arrays[f"{split}.rejected"].lengths for split in SPLITS}
    count, taken = len(lengths["train"]), config.steps * config.batch_size
    mean = float(lengths["train"].mean())
    measured = mean * min(taken, count) + float(lengths["heldout"].sum()) if reference else 0.0
    return Work(
        f"{many(config.steps, 'step', ',')} x {many(config.batch_size, 'pair')} of answers of at most"
        f" {config.sequence_length} tokens: {taken / count:.3g} epochs of {many(count, 'pair', ',')}",
        tokens=taken * mean,
        forward_tokens=measured,
    )


def pair_batch(arrays: dict, split: str, indices, pad_id: int) -> dict:
    """A micro-batch of pairs: inputs [2B, T], chosen first, padded on the right; labels of the answers' tokens,
    already shifted; margin [B]."""
    import torch

    ids = [arrays[f"{split}.{which}"][index] for which in ("chosen", "rejected") for index in indices]
    starts = [int(arrays[f"{split}.start"][index]) for _ in range(2) for index in indices]
    longest = max(len(row) for row in ids)
    input_ids = np.full((len(ids), longest), pad_id, np.int64)
    labels = np.full((len(ids), longest), -100, np.int64)
    mask = np.zeros((len(ids), longest), np.int64)
    for row, (tokens, start) in enumerate(zip(ids, starts, strict=True)):
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, start - 1 : len(tokens) - 1] = tokens[start:]
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask), "use_cache": False}
    margin = torch.from_numpy(np.asarray(arrays[f"{split}.margin"][list(indices)], np.float32))
    return {"inputs": inputs, "weight": float(len(indices)), "labels": torch.from_numpy(labels), "margin": margin}
