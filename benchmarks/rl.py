"""PPO and GRPO here beside TRL: same model, prompts, lengths, micro-batches, dtype and threads.

Each side is a process of its own; turns alternate. GRPO is that of the installed TRL. PPO was removed from TRL; its
last version with it is installed aside into a folder that --trl names, or into a temporary one (network).

    python benchmarks/rl.py                          # an hour on two cores
    python benchmarks/rl.py --quick                  # one iteration each: shows that it works, its numbers say little
    python benchmarks/rl.py --tasks ppo --trl ~/trl  # some of ppo, grpo, mix

Llama of 13.8M parameters (6 layers of 384, vocabulary 8192, tied) with random weights, prompts of Alpaca in English and
Chinese (10 to 202 tokens, 29 on average), 32 responses per iteration in micro-batches of 8, bf16 autocast or, on a CPU
without instructions for it, fp32. ppo: prompts of at most 128 tokens, responses of 64, 4 epochs, reward model, value
model and reference of the policy's size. grpo: the same lengths, 8 responses per prompt, a reward function, no KL, 1
epoch. mix: ppo with all prompts, and responses of at most 192 that end at each token with a probability of 1/48. Rates
are of responses per second over all iterations, without loading, evaluating and saving. Peaks are of the whole process,
seen from outside. TRL's other settings are its defaults. The last line is JSON:

    ppo_ratio, grpo_ratio, mix_ratio      responses/s, alma / TRL (goals 2, 1.5, 3)
    ppo_cpu_ratio, ...                    the same per second of CPU time, which other programs disturb less
    peak_ratio                            peak memory of ppo, alma / TRL (goal 1)
    grpo_..._same_checkpointing           with TRL's gradient checkpointing off, which is on by default in its GRPO; its
                                          PPO never turned it on
    rollout, measure, score, update       shares of an iteration of alma's, by task
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import sides  # noqa: E402

TRL_WITH_PPO = "trl==1.12.0"
PARTS = ("rollout", "measure", "score", "update")
MICRO, SAMPLES, EPOCHS = 8, 8, 4
# Of each task: model folder, longest prompt, longest response.
TASKS = {"ppo": ("model", 128, 64), "grpo": ("model", 128, 64), "mix": ("ends", 256, 192)}
MEAN_RESPONSE = 48  # tokens of a response in mix, if nothing cuts it off

REWARD = """
def letters(response):
    return response.count("e") / max(1, len(response))
"""


# ---- what both sides get ---------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Models, and prompts of both ranges of lengths."""
    from rules_corpus import read
    from tune import write_model

    rows = [row for name in ("answers_en", "answers_zh") for row in json.loads(read(name))]
    model = write_model(folder, [row["instruction"] + row["output"] for row in rows])
    write_reward_model(folder)
    write_ending_model(folder, model)
    (folder / "rewards.py").write_text(REWARD)

    prompts = []
    for row in rows:
        text = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        prompts.append([{"role": "user", "content": text}])
    lengths = [len(ids) for ids in encoded(folder, prompts)]
    for task, (_, longest, _) in TASKS.items():
        lines = []
        for prompt, length in zip(prompts, lengths, strict=True):
            if 10 <= length <= longest:
                lines.append(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


def encoded(folder: Path, prompts: list[list[dict]]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]


def prompts_of(folder: Path, task: str) -> list[list[dict]]:
    lines = (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def write_reward_model(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


def write_ending_model(folder: Path, model) -> None:
    """The same model, whose responses end: channel 0 of the residual stream is a constant, which no layer writes to,
    and the embedding of the end token, with which the output layer is tied, has more of it."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        ids = torch.randint(10, 8000, (8, 64), generator=torch.Generator().manual_seed(0))
        outputs = model(ids, output_hidden_states=True)
        others = outputs.logits.exp().sum(-1).mean()
        wanted = torch.log(others / (MEAN_RESPONSE - 1)) - outputs.logits[..., tokenizer.eos_token_id].mean()
        embeddings[tokenizer.eos_token_id, 0] += wanted / outputs.hidden_states[-1][..., 0].mean()
    model.save_pretrained(folder / "ends")
    tokenizer.save_pretrained(folder / "ends")


def size_of(folder: Path) -> tuple[int, int]:
    """(responses of an iteration, iterations)."""
    return tuple(json.loads((folder / "size.json").read_text()))


def precision() -> str:
    import torch

    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(found for name, found in capabilities.items() if name.endswith("bf16")) else "fp32"


# ---- sides: each returns units (responses), seconds and rows (prompts) -----------------------------------------------


def alma(task: str, folder: Path, model: str) -> dict:
    from pipeline.core.recipe import load
    from pipeline.core.stage import run_stage
    from pipeline.rl import iteration

    model, longest_prompt, longest_response = TASKS[task]
    rows, iterations = size_of(folder)
    kind = "grpo" if task == "grpo" else "ppo"
    if kind == "grpo":
        own = f"batch_size: {rows // SAMPLES}, samples: {SAMPLES}, rewards: {{e: {{function: 'rewards.py:letters'}}}}"
        inputs = f"{{policy: {folder / model}}}"
    else:
        own = f"batch_size: {rows}, ppo: {{epochs: {EPOCHS}, calibrate: 0}}"
        inputs = f"{{policy: {folder / model}, reward: {folder / 'reward'}}}"
    recipe = folder / f"{task}.yaml"
    recipe.write_text(
        f"name: {task}\noutput: {tempfile.mkdtemp(dir=folder)}\nstages:\n  {kind}: {{inputs: {inputs}, sources: {{all:"
        f" {{path: {folder / task}.jsonl}}}}, holdout: 0.02, steps: {iterations}, {own}, micro_batch: {MICRO},"
        f" sequence_length: {longest_prompt + longest_response}, rollout: {{max_new_tokens: {longest_response}}},"
        f" precision: {precision()}, evaluate_prompts: 1, show: 0, save: {{every_steps: 100000}},"
        " log: {every_steps: 1}}\n"
    )
    cpu, original = 0.0, iteration.iterate

    def timed(*arguments):
        nonlocal cpu
        start = time.process_time()
        stats = original(*arguments)
        cpu += time.process_time() - start
        return stats

    iteration.iterate = timed
    output = run_stage(load(recipe), kind)
    lines = [json.loads(line) for line in (output.path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "policy_loss" in line]
    assert len(lines) == iterations
    parts = {part: sum(line[f"seconds_{part}"] for line in lines) for part in PARTS}
    seconds = sum(parts.values())
    shares = {part: round(own / seconds, 3) for part, own in parts.items()}
    length = sum(line["length_mean"] for line in lines) / iterations
    return {
        "units": rows * iterations,
        "seconds": seconds,
        "cpu": cpu,
        "rows": output.manifest["metrics"]["train_prompts"],
        "shares": shares,
        "length": length,
    }


def trl(task: str, folder: Path, model: str) -> dict:
    return trl_grpo(folder) if task == "grpo" else trl_ppo(task, folder)


def trl_without_checkpointing(task: str, folder: Path, model: str) -> dict:
    return trl_grpo(folder, gradient_checkpointing=False)


def trl_options(folder: Path, rows: int) -> dict:
    return {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": precision() == "bf16",
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": rows // MICRO,
        "temperature": 1.0,
    }


def trl_ppo(task: str, folder: Path) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    model, _, longest_response = TASKS[task]
    rows, iterations = size_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / model, padding_side="left")
    data = Dataset.from_dict({"input_ids": encoded(folder, prompts_of(folder, task))})
    config = PPOConfig(
        **trl_options(folder, rows),
        total_episodes=rows * iterations,
        response_length=longest_response,
        stop_token="eos",
        num_ppo_epochs=EPOCHS,
        missing_eos_penalty=1.0,
        num_sample_generations=0,
    )
    trainer = PPOTrainer(
        config,
        tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / model),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / model),
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        train_dataset=data,
        eval_dataset=data,
    )
    return {"units": rows * iterations, "rows": len(data), **timed_training(trainer)}


def timed_training(trainer) -> dict:
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def trl_grpo(folder: Path, **settings) -> dict:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, _, longest_response = TASKS["grpo"]
    rows, iterations = size_of(folder)
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts_of(folder, "grpo")])

    def letters(completions, **_):
        texts = [completion[-1]["content"] for completion in completions]
        return [text.count("e") / max(1, len(text)) for text in texts]

    config = GRPOConfig(
        **trl_options(folder, rows),
        max_steps=iterations,
        num_generations=SAMPLES,
        max_completion_length=longest_response,
        **settings,
    )
    trainer = GRPOTrainer(str(folder / model), reward_funcs=letters, args=config, train_dataset=data)
    return {"units": rows * iterations, "rows": len(data), **timed_training(trainer)}


SIDES = {"alma": alma, "trl": trl, sides.SAME: trl_without_checkpointing}


# ---- turns -----------------------------------------------------------------------------------------------------------


def install_trl(folder: Path) -> Path:
    """TRL_WITH_PPO without its dependencies, which are those of the installed version."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL_WITH_PPO]
    subprocess.run(command, check=True)
    return folder


def rounds_of(task: str, folder: Path, rounds: int, old_trl: Path) -> list[dict[str, dict]]:
    """Side -> its numbers, of each round."""
    model = TASKS[task][0]
    found = []
    for _ in range(rounds):
        turns = {"alma": sides.turn(__file__, "alma", task, folder, model)}
        if task == "grpo":
            for side in ("trl", sides.SAME):
                turns[side] = sides.turn(__file__, side, task, folder, model)
        else:
            turns["trl"] = sides.turn(__file__, "trl", task, folder, model, PYTHONPATH=str(old_trl))
        found.append(turns)
    return found


def ratios_of(task: str, rounds: list[dict[str, dict]]) -> dict[str, float]:
    """Entries of the closing line."""
    found = {}
    for side, ending in (("trl", ""), (sides.SAME, "_same_checkpointing")):
        if side not in rounds[0]:
            continue
        pairs = [(turns["alma"], turns[side]) for turns in rounds]
        found[f"{task}_ratio{ending}"] = sides.ratio("rate", pairs)
        found[f"{task}_cpu_ratio{ending}"] = 1 / sides.ratio("cpu", pairs)
        if task == "ppo":
            found["peak_ratio"] = sides.ratio("peak", pairs)
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = sides.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="one iteration of 16 responses, one round")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of ppo, grpo, mix (all)")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", type=Path, help=f"folder with {TRL_WITH_PPO} (pip install --no-deps --target FOLDER)")
    given = parser.parse_args()
    if sides.serve(given, SIDES):
        return
    rows, iterations, rounds = (16, 1, 1) if given.quick else (32, given.iterations, given.rounds)
    result: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        (folder / "size.json").write_text(json.dumps([rows, iterations]))
        old_trl = given.trl.resolve() if given.trl else install_trl(folder / "old_trl")
        for task in given.tasks.split(","):
            turns = rounds_of(task, folder, rounds, old_trl)
            result |= ratios_of(task, turns)
            for part in PARTS:
                result.setdefault(part, {})[task] = turns[-1]["alma"]["shares"][part]
    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    setting = {
        "responses": rows,
        "iterations": iterations,
        "rounds": rounds,
        "threads": sides.THREADS,
        "precision": precision(),
    }
    print(json.dumps({**result, **setting, **packages, "ppo_of": TRL_WITH_PPO}))


if __name__ == "__main__":
    main()
