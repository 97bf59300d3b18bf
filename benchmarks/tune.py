"""SFT, DPO and LoRA here beside TRL, as its documentation starts them: same model, records, loss, dtype and threads.

Each side is a process of its own; turns alternate.

    python benchmarks/tune.py              # tens of minutes on two cores
    python benchmarks/tune.py --quick      # few records, one round: shows that it works, its numbers say little

Llama of 13.8M parameters (6 layers of 384, vocabulary 8192, tied), Alpaca in English and Chinese out of a package, at
most 1,024 tokens, batches of 8, bf16 autocast. Pairs for DPO: an answer, and that of another record. TRL's settings are
its defaults (gradient checkpointing, a reference model in memory); in a further turn of each round it keeps all
activations, as alma does by default. Rates are of steps, without tokenising, evaluating and saving; that of DPO
includes the reference. Peaks are of the whole process, seen from outside. The last line is JSON:

    sft_ratio_default, sft_ratio_packed    trained tokens/s, alma / TRL without and with packing (goals 3 and 2)
    dpo_ratio                              pairs/s over two epochs, alma / TRL (goal 2.5)
    lora_ratio                             trained tokens/s with LoRA, alma / TRL with peft (goal 1)
    sft_peak_ratio, dpo_peak_ratio         peak memory at vocabulary 128k, alma / TRL (goal 0.5)
    ..._same_checkpointing                 each of these with TRL's gradient checkpointing off
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import sides  # noqa: E402

BATCH, LENGTH, LARGE = 8, 1024, 131072


# ---- what both sides get ---------------------------------------------------------------------------------------------


def prepare(folder: Path, count: int) -> None:
    """Records, and a model in two sizes of vocabulary."""
    from rules_corpus import read

    from pipeline.models.publish import publish

    rows = [row for name in ("answers_en", "answers_zh") for row in json.loads(read(name))]
    rows = [rows[number * len(rows) // count] for number in range(count)]
    talks = []
    for row in rows:
        asked = [{"role": "user", "content": "\n".join(part for part in (row["instruction"], row["input"]) if part)}]
        talks.append({"prompt": asked, "completion": [{"role": "assistant", "content": row["output"]}]})
    answers = [talk["completion"] for talk in talks]
    pairs = []
    for number, talk in enumerate(talks):
        pairs.append({"prompt": talk["prompt"], "chosen": answers[number], "rejected": answers[number - 1]})
    for name, records in (("talks", talks), ("pairs", pairs)):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model = write_model(folder, [row["instruction"] + row["output"] for row in rows])
    model.resize_token_embeddings(LARGE)
    publish(model.state_dict(), model.config, folder / "tokenizer", folder / "large")


def write_model(folder: Path, texts: list[str]):
    """A tokenizer trained on texts, and a model with random weights, which is returned."""
    from pipeline.data.tokenizer import byte_bpe, pretokenize
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.data.tokenizer.special_tokens import SPECIAL
    from pipeline.data.tokenizer.tokenizer_folder import publish as publish_tokenizer
    from pipeline.models import build
    from pipeline.models.publish import publish

    size = sum(len(text.encode()) for text in texts)
    learned, merges = byte_bpe.train(texts, 8192 - len(SPECIAL), True, True, size)
    ids = {token: index for index, token in enumerate(learned)}
    publish_tokenizer(byte_bpe.build(ids, merges, pretokenize.pattern(True), SPECIAL), folder / "tokenizer")
    block = {
        "family": "llama",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "tie_word_embeddings": True,
    }
    model = build.new(block, load_tokenizer(folder / "tokenizer"), LENGTH, seed=0)
    publish(model.state_dict(), model.config, folder / "tokenizer", folder / "model")
    return model


# ---- contestants: each returns units (trained tokens or pairs), seconds and rows -------------------------------------


def alma(task: str, folder: Path, model: str) -> dict:
    import time

    from pipeline import dpo
    from pipeline.core.recipe import load
    from pipeline.core.stage import run_stage

    kind = "dpo" if task == "dpo" else "sft"
    data, epochs = ("pairs", 2) if task == "dpo" else ("talks", 1)
    lora = "lora: {rank: 16}, " if task == "lora" else ""
    recipe = folder / f"{task}.yaml"
    recipe.write_text(
        f"name: {task}-{model}\noutput: {tempfile.mkdtemp(dir=folder)}\nstages:\n  {kind}: {{inputs: {{model:"
        f" {folder / model}}}, sources: {{all: {{path: {folder / data}.jsonl}}}}, holdout: 0.02, max_bad: 1,"
        f" epochs: {epochs}, batch_size: {BATCH}, sequence_length: {LENGTH}, {lora}"
        f"{'max_prompts: 0, ' if kind == 'sft' else ''}save: {{every_steps: 100000}}}}\n"
    )
    begun, seconds = time.perf_counter, 0.0
    original = dpo.reference

    def timed(*arguments):
        nonlocal seconds
        start = begun()
        table = original(*arguments)
        seconds += begun() - start
        return table

    dpo.reference = timed
    output = run_stage(load(recipe), kind)
    metrics = output.manifest["metrics"]
    taken = metrics["sources"]["all"]["taken"]
    if task == "dpo":
        return {"units": taken, "seconds": seconds + taken / metrics["pairs_per_second"], "rows": taken}
    units = metrics["trained_tokens"]
    return {"units": units, "seconds": units / metrics["tokens_per_second"], "rows": taken}


def trl(task: str, folder: Path, model: str, **settings) -> dict:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    data = load_dataset("json", data_files=str(folder / ("pairs.jsonl" if task == "dpo" else "talks.jsonl")))["train"]
    options = {"output_dir": str(folder / "trl"), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    options |= settings
    if task == "dpo":
        trainer = DPOTrainer(str(folder / model), args=DPOConfig(**options, num_train_epochs=2), train_dataset=data)
        rows = 2 * len(trainer.train_dataset)
        return {"units": rows, "seconds": trainer.train().metrics["train_runtime"], "rows": rows}
    adapters = {}
    if task == "lora":
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    config = SFTConfig(**options, num_train_epochs=1, packing=task == "packed")
    trainer = SFTTrainer(str(folder / model), args=config, train_dataset=data, **adapters)
    collate, units = trainer.data_collator, 0

    def counting(rows):
        nonlocal units
        batch = collate(rows)
        units += int((batch["labels"] != -100).sum())
        return batch

    trainer.data_collator = counting
    seconds = trainer.train().metrics["train_runtime"]
    return {"units": units, "seconds": seconds, "rows": len(data)}


def trl_without_checkpointing(task: str, folder: Path, model: str) -> dict:
    return trl(task, folder, model, gradient_checkpointing=False)


SIDES = {"alma": alma, "trl": trl, sides.SAME: trl_without_checkpointing}


# ---- turns -----------------------------------------------------------------------------------------------------------


def compared(name: str, task: str, folder: Path, model: str, rounds: int, key: str) -> dict[str, float]:
    """Median over rounds of alma's number divided by TRL's with and without gradient checkpointing, by name."""
    turns = [[sides.turn(__file__, side, task, folder, model) for side in SIDES] for _ in range(rounds)]
    return {
        name: sides.ratio(key, [(mine, default) for mine, default, _ in turns]),
        f"{name}_same_checkpointing": sides.ratio(key, [(mine, same) for mine, _, same in turns]),
    }


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="64 records, one round")
    parser.add_argument("--records", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if sides.serve(given, SIDES):
        return
    records, rounds = (64, 1) if given.quick else (given.records, given.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, records)
        result = {
            **compared("sft_ratio_default", "sft", folder, "model", rounds, "rate"),
            **compared("sft_ratio_packed", "packed", folder, "model", rounds, "rate"),
            **compared("dpo_ratio", "dpo", folder, "model", rounds, "rate"),
            **compared("lora_ratio", "lora", folder, "model", rounds, "rate"),
            **compared("sft_peak_ratio", "sft", folder, "large", 1, "peak"),
            **compared("dpo_peak_ratio", "dpo", folder, "large", 1, "peak"),
        }
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    rounded = {key: round(value, 3) for key, value in result.items()}
    print(json.dumps({**rounded, "records": records, "rounds": rounds, "threads": sides.THREADS, **packages}))


if __name__ == "__main__":
    main()
