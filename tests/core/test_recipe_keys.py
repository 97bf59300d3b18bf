"""Every key of every stage changes something: the stage reads it while it runs, or it is refused."""

import json
import os

import chain_rows
import harness
import key_trace
import key_values
import pytest
import tuned

from pipeline.core.errors import UserError
from pipeline.core.recipe import KINDS, load

TUNING = "steps: 2, batch_size: 4, sequence_length: 128"
TEXT = "a {words} {noun} is a {kind}, and the {noun} is {words}; {kind} {noun} {words} {noun}, {words} {kind}"
PROMPT = "prompt: 'What is a {words} {noun}?'"
JUDGED = f"{PROMPT}, completion: '{{kind}}', label: '1'"
# No key that can be left out is given, but for `workers`: other processes would not note what they read.
RECIPE = f"""
name: least
model: {{family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}}
sources: {{nouns: {{path: rows.jsonl}}}}
stages:
  clean:
    sources: {{animals: {{path: animals.txt, sample_by: line}}, nouns: {{from: nouns, text: "{TEXT}"}}}}
    filters: {{max_repeated_shingles: 1.0}}
    holdout: 0.1
    workers: 1
  tokenizer: {{vocab_size: 320, algorithm: byte-bpe}}
  pack: {{}}
  pretrain: {{{TUNING}}}
  sft: {{{TUNING}, sources: {{nouns: {{from: nouns, {tuned.CHAT}}}}}}}
  reward: {{{TUNING}, sources: {{nouns: {{from: nouns, {tuned.PAIR}}}}}}}
  prm: {{{TUNING}, sources: {{steps: {{path: steps.jsonl}}}}}}
  dpo: {{{TUNING}, sources: {{nouns: {{from: nouns, {tuned.PAIR}}}}}}}
  kto: {{{TUNING}, sources: {{nouns: {{from: nouns, {JUDGED}}}}}}}
  ppo: {{{TUNING}, rollout: {{max_new_tokens: 4}}, sources: {{nouns: {{from: nouns, {PROMPT}}}}}, inputs: {{policy: sft}}}}
  grpo: {{{TUNING}, rollout: {{max_new_tokens: 4}}, sources: {{nouns: {{from: nouns, {PROMPT}}}}}, inputs: {{policy: sft}}}}
  soup: {{inputs: {{a: sft, b: dpo}}, sources: {{nouns: {{from: nouns, {tuned.CHAT}}}}}}}
  assess:
    sources: {{nouns: {{from: nouns, {PROMPT}}}}}
    inputs: {{tokens: pack, sft: sft}}
    max_prompts: 4
    max_new_tokens: 2
  export: {{inputs: {{model: sft}}}}
"""
# Keys that mean something only beside others: runs that have these. A run may end with a refusal of what it finds.
BESIDE = {
    "clean": [
        [
            "clean.language={keep: [en, zh]}",
            "clean.rules={use: [gopher_repetition, gopher_quality, c4, fineweb]}",
            "clean.repair={mojibake: true, full_width: letters}",
            "clean.mask={use: [email]}",
            "clean.block={words: [spam], urls: [spam]}",
            "clean.decontaminate={sets: {nouns: {path: rows.jsonl, text: noun}}}",
        ],
        ["clean.repair.script=simplified"],
        ["clean.dedup.near.shingle=3"],
    ],
    "pretrain": [["pretrain.optimizer.kind=muon", "pretrain.schedule={kind: wsd, decay_steps: 1}"]],
    "sft": [
        ["sft.sequence_length=16", "sft.too_long=truncate", "sft.spikes.policy=skip"],
        ["sft.lora={rank: 2}", "sft.best={every_steps: 1}"],
        ["sft.inputs={model: pretrain, teacher: pretrain}", "sft.distill={weight: 0.5}"],
    ],
    "reward": [["reward.lora={rank: 2}", "reward.best={every_steps: 1}"]],
    "prm": [["prm.lora={rank: 2}", "prm.best={every_steps: 1}"]],
    "dpo": [
        ["dpo.lora={rank: 2}", "dpo.loss=simpo", "dpo.best={every_steps: 1}"],
        ["dpo.loss={robust: 1.0, sft: 0.1}", "dpo.label_smoothing=0.1"],
    ],
    "kto": [["kto.lora={rank: 2}", "kto.best={every_steps: 1}"]],
    "ppo": [["ppo.ppo.kl_target=1.0", "ppo.rule=exact", "ppo.sources.nouns.answer='{kind}'"], ["ppo.lora={rank: 2}"]],
    "grpo": [
        ["grpo.rule=exact", "grpo.sources.nouns.answer='{kind}'", "grpo.update={kl_coef: 0.1, minibatches: 2}"],
        ["grpo.lora={rank: 2}", "grpo.overlong={buffer: 2}"],
    ],
    "assess": [
        ["assess.sources.nouns.answer='{kind}'"],
        ["assess.inputs={tokens: pack, sft: sft, dpo: dpo, reward: reward}", "assess.compare=[[sft, dpo]]"],
        [
            "assess.speed={prompt_tokens: 4, new_tokens: 4, batches: [1], repeats: 1}",
            "assess.memorised={samples: 2, prefix: 4, continuation: 4}",
            "assess.refusals={max_new_tokens: 4}",
        ],
    ],
}
# Read by what starts a stage, and not by the stage.
STARTED = {
    "kind": "which script runs",
    "inputs": "parents: test_recipe.py",
    "run.processes": "what is launched: test_checkpoints.py; other stages refuse it, below",
    "run.nodes": "the job script: test_launch.py; other stages refuse it, below",
    "run.time": "the job script: test_launch.py",
    "run.threads": "what is launched: below",
    "watch.hang": "the watch around a stage: test_heartbeat.py",
    "watch.start": "the watch around a stage: test_heartbeat.py",
    "watch.lost": "the watch around a stage: test_heartbeat.py",
}
# Read when something happens that no small run has.
RARE = {
    "spikes.in_a_row": "after so many steps that are not applied: test_spikes.py",
    "spikes.rollbacks": "after so many rollbacks: test_spikes.py",
    "max_bad": "where records are unusable: test_conversations.py",
    "time": "a horizon in hours: test_train_length.py",
}


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    folder = tmp_path_factory.mktemp("least")
    chain_rows.rows_of(folder)
    lines = [json.dumps(row, ensure_ascii=False) for row in tuned.stepped_rows()]
    (folder / "steps.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "least.yaml").write_text(RECIPE, encoding="utf-8")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def reads(folder, kind: str, words: list[str]) -> set[str]:
    """`Class.key` of what a stage reads in a run with these words."""
    trace = folder / f"{kind}.{len(words)}.trace"
    trace.write_text("")
    environment = {"OMP_NUM_THREADS": "1", "ALMA_TEST_TRACE": str(trace)}
    again = ["--restart"] if words else []
    log = str(folder / "log")
    process = harness._context.Process(
        target=key_trace.traced, args=(kind, ["least.yaml", *words, *again], environment, str(folder), log)
    )
    process.start()
    process.join(300)
    ended = process.exitcode
    assert ended == 0 or words and ended == 2, f"{kind} {words} ended with {ended}: {(folder / 'log').read_text()}"
    return set(trace.read_text().split())


def refused(kind: str, key: str, value) -> str | None:
    try:
        config = load("least.yaml", [f"{kind}.{key}={json.dumps(value)}"]).stages[kind]
        config.check(config.run.world)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_every_key_of_every_stage_is_read_or_refused(least):
    """correctness 4: what a recipe says changes what a stage does, or ends it; a key that only changed its identity
    would be read nowhere."""
    idle = {}
    for kind in KINDS:
        read = reads(least, kind, [])
        beside = set()
        for words in BESIDE.get(kind, []):
            beside |= reads(least, kind, words)
        for path, (model, field) in key_values.keys(kind).items():
            key, name = ".".join(path), f"{model.__name__}.{path[-1]}"
            if name in read or key in STARTED or key in RARE or key.startswith("resources."):  # tests/cluster
                continue
            # not read where it stands alone: then it is refused there, or it is what makes itself be read
            said = refused(kind, key, key_values.other(field))
            if said is None and name not in beside:
                idle[f"{kind}.{key}"] = key_values.other(field)
        reads(least, kind, [])  # up to date again, for the stages that follow
    assert not idle, f"accepted and read nowhere: {idle}"


@pytest.mark.parametrize(
    "word, said",
    [
        ("sft.sources.nouns.text=noun", "text: 'noun' is for documents"),
        ("reward.sources.nouns.text=noun", "text: 'noun' is for documents"),
        ("sft.sources.nouns={path: nouns.jsonl, join: ' '}", "join: ' ' separates the items of a list"),
        ("sft.sources.nouns.rule=exact", "rule: 'exact' says how answers are compared with `answer`"),
        ("ppo.log.peak=100", "log.peak: 100.0 is for estimates of time"),
        ("pretrain.spikes.sigma=5", "sigma: 5.0 defines a spike, and policy: off looks for none"),
        ("ppo.spikes={policy: skip, rollbacks: 4}", "rollbacks: 4 applies only to policy: rollback"),
        ("dpo.parallel.partition=uniform", "partition: 'uniform' distributes layers over pipeline stages"),
        ("pretrain.parallel.layers=[2]", "layers: [2] distributes layers over pipeline stages"),
        ("pretrain.parallel={pipeline: 2, layers: [1, 1], partition: uniform}", "and layers both set"),
        ("pretrain.run.time=banana", "'banana' is not a duration"),
        ("pretrain.resources.time=banana", "'banana' is not a duration"),
        ("pretrain.resources.gpus=8", "resources.gpus: 8 per node and run.processes: 1 do not fit"),
        ("pretrain.resources.memory='64'", "resources.memory is '64', expected a number and K, M, G or T"),
        ("pretrain.resources.sbatch=[--time=3]", "'--time=3': give the key time instead"),
        ("pretrain.resources.sbatch=[--array=1-3]", "'--array=1-3': alma gives --array itself"),
        ("pretrain.resources.sbatch=[-p]", "'-p' is not an option"),
        ('pretrain.resources.environment={A: "b\\nc"}', "expected one line of text"),
        ("clean.resources.gpus=1", "resources.gpus: 1 would be idle, because stage clean uses no GPU"),
        ("clean.resources.nodes=2", "stage clean: 2 processes were launched, but it runs in one"),
        ("sft.run.device=xpu", "run.device: Intel's GPUs are not supported; write cpu (docs/install.md)"),
        ("sft.run.device=rocm", "run.device: GPUs of AMD are cuda, as torch's builds for ROCm call them"),
        ("clean.run.device=cuda", "run.device: cuda has no effect, because only stages that train or assess use a GPU"),
        ("export.run.device=cpu", "run.device: cpu has no effect, because only stages that train or assess use a GPU"),
        ("pack.seed=3", "seed: 3 decides which documents of `shards` are held out, and there are none"),
        ("soup.seed=3", "seed: 3 decides nothing, because a soup draws nothing at random"),
        ("clean.language.min_confidence=0.5", "min_confidence: 0.5 is for detected languages"),
        ("clean.dedup={exact: false, near: false, keep: longest}", "keep: 'longest' is about duplicates, and exact"),
        ("ppo.ppo.critic_warmup=1000", "ppo.critic_warmup: 1000 is more than steps"),
        ("tokenizer.reserved_tokens=5000", "is too small for 256 bytes and 500"),
        ("pretrain.optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 is 1.0, expected less than 1"),
        (
            "clean.rules.en.max_words=10",
            "en.max_words: 10.0 belongs to the rules gopher_quality, which use does not name",
        ),
        ("clean.rules={use: [c4], zh: {short_line: 3}}", "zh.short_line: 3 belongs to the rules fineweb"),
        ("clean.rules.lines.javascript=false", "lines belongs to the rules c4"),
        ("clean.block.min_words=2", "min_words: 2 counts phrases of words, and there are no words"),
        ("clean.block.url='{address}'", "url: '{address}' is compared with urls"),
        ("clean.mask.form='<{}>'", "form: '<{}>' says how a mask is written"),
        ("clean.examples={good: {path: rows.jsonl}}", "examples.good: no model is trained from it"),
        ("clean.sources.animals.split=test", "split: 'test' belongs to dataset"),
        ("ppo.ppo.kl_horizon=5", "kl_horizon: 5 is how fast kl_coef is adapted, and without kl_target it is constant"),
        ("ppo.ppo={kl_coef: 0, kl_estimator: k3}", "kl_estimator: 'k3' estimates the KL in the reward"),
        ("ppo.ppo={kl_coef: 0, kl_target: 6}", "kl_target: 6.0 adapts kl_coef by factors"),
        ("ppo.ppo={epochs: 1, target_kl: 0.1}", "target_kl: 0.1 ends an iteration's updates early"),
        ("clean.mask.use=[email, phone, email]", "mask.use: names 'email' twice; remove one"),
        ("clean.rules.use=[c4, c4]", "rules.use: names 'c4' twice; remove one"),
        ("tokenizer.balance=[source, source]", "balance: names 'source' twice; remove one"),
        ("sft.lora.targets=[q_proj, q_proj]", "lora.targets: names 'q_proj' twice; remove one"),
        ("assess.bootstrap=500", "bootstrap: 500 is for the intervals of comparisons"),
        ("assess.rule=exact", "rule: 'exact' decides how answers are compared with `answer`, and no source has one"),
        ("tokenizer.run.processes=2", "stage tokenizer: 2 processes were launched, but it runs in one"),
        ("clean.run.nodes=2", "stage clean: 2 processes were launched, but it runs in one"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(least, word, said):
    """correctness 4: also one that would change a run's identity and not its result."""
    with pytest.raises(UserError) as caught:
        config = load("least.yaml", [word]).stages[word.partition(".")[0]]
        config.check(config.run.world)
    assert said in str(caught.value)


def test_a_shared_source_gives_each_stage_what_it_reads(least):
    """correctness 4: `text` of a source at the top is clean's; the tuning stages take the rest over."""
    recipe = load("least.yaml", ["sources.nouns.text='{noun}'", "sources.nouns.limit=5"])
    assert recipe.stages["sft"].sources["nouns"].limit == 5
    assert recipe.stages["sft"].sources["nouns"].text == "text"


def test_the_seed_of_a_recipe_is_no_part_of_stages_that_draw_nothing(least):
    """correctness 4: another seed packs the same tokens and makes the same soup."""
    assert load("least.yaml", ["seed=5"]).stages["soup"].seed == 0
    assert load("least.yaml", ["seed=5"]).stages["pack"].seed == 0
    assert load("least.yaml", ["seed=5", "pack.shards={a: {path: x}}"]).stages["pack"].seed == 5


@pytest.mark.parametrize("kind", KINDS)
def test_threads_reach_every_stage(least, kind, monkeypatch):
    """correctness 4: run.threads counts where a stage is started by hand, too."""
    from pipeline.core import stage

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(stage, "find_inputs", lambda *_: (_ for _ in ()).throw(UserError("far enough")))
    with pytest.raises(UserError):
        stage.run_stage(load("least.yaml", [f"{kind}.run.threads=3"]), kind)
    assert os.environ["OMP_NUM_THREADS"] == "3"
