"""A process reward model as a reward: steps of responses against transformers, and runs of grpo and ppo."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from harness import stage, succeed
from ppo_world import SPECIAL, tokenizer_of, write_world
from test_ppo import close, ranks
from transformers import AutoModelForTokenClassification, AutoTokenizer, LlamaConfig, LlamaForTokenClassification

from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat
from pipeline.models import build
from pipeline.rl.process_reward import COMBINE, ProcessReward, pieces_of
from pipeline.rl.prompts import Task

SEPARATOR = "a"


def write_process_model(folder):
    """A model with random weights, as stage prm publishes it, with a vocabulary of its own."""
    tokenizer = tokenizer_of("?21\n zyxwvutsrqponmlkjihgfedcba")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        id2label={0: "wrong", 1: "right"},
        label2id={"wrong": 0, "right": 1},
        classifier_dropout=0.0,
        pad_token_id=0,
        eos_token_id=SPECIAL.index("<|eos|>"),
        alma_step_separator=SEPARATOR,
    )
    LlamaForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("process"))
    write_process_model(folder / "process/model")
    return folder


@torch.no_grad()
def expected(folder, prompt: str, response: str) -> list[float]:
    """By transformers, one text at a time: every character is a token, so a step ends where its last one is."""
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    right = model(torch.tensor([ids])).logits[0].softmax(-1)[:, 1].tolist()
    header = "<|im_start|>assistant\n"
    begin = len(tokenizer(text[: text.index(header) + len(header)], add_special_tokens=False).input_ids)
    ends = [begin + place for place, letter in enumerate(response) if letter == SEPARATOR]
    return [right[end] for end in ends] + [right[begin + len(response)]]  # the last one at the end of the turn


def test_steps_of_a_text():
    for text, pieces in (
        ("one\ntwo", ["one\n", "two"]),
        ("one\n\n\ntwo\nthree", ["one\n\n\n", "two\n", "three"]),
        ("\none", ["\none"]),
        ("one", ["one"]),
        ("", []),
        (" \n \n", []),
    ):
        assert pieces_of(text, "\n") == pieces and "".join(pieces) in (text, "")
    assert pieces_of("xкиyки", "ки") == ["xки", "yки"]


def test_scores_of_steps_are_those_of_transformers(world):
    """Responses of different lengths in one batch; white space at the ends is dropped; what has no text or was cut off
    is wrong."""
    folder = world / "process/model"
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    reward = ProcessReward(build.load(folder, head="steps").eval(), chat, SEPARATOR)
    texts = ["zabac", " xyzab\n", "bbb", "", "zabac"]
    samples = [SimpleNamespace(text=text, stopped=number < 4) for number, text in enumerate(texts)]
    tasks = [Task([], Dialogue([{"role": "user", "content": "q?"}]), "q?", None)] * len(texts)
    models = SimpleNamespace(
        text=lambda sample: sample.text,
        autocast=contextlib.nullcontext,
        config=SimpleNamespace(rollout=SimpleNamespace(batch=2)),
    )
    found = reward.steps(models, samples, tasks)
    assert found[3] == found[4] == [0.0]
    for text, scores in zip(texts[:3], found[:3], strict=True):
        wanted = expected(folder, "q?", text.strip())
        assert len(scores) == text.count(SEPARATOR) + 1 and scores == pytest.approx(wanted, abs=1e-5)
    assert COMBINE["minimum"](found[0]) == min(found[0])
    assert COMBINE["product"](found[0]) == pytest.approx(found[0][0] * found[0][1] * found[0][2])


WORDS = (
    "grpo.inputs={policy: ./policy, process: ./process}",
    "grpo.rewards={low: {function: process}, all: {function: process, weight: 0.5, arguments: {combine: product}}}",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_stage_learns_from_it(world, kind):
    """Both ways to combine steps, as transformers gives them for the published samples."""
    words = [word.replace("grpo", kind) for word in WORDS]
    recipe = {"grpo": "group.yaml", "ppo": "recipe.yaml"}[kind]
    text = succeed(kind, recipe, *words, f"{kind}.steps=1", f"output=learn-{kind}", cwd=world)
    assert "process reward model" in text
    current = (world / f"learn-{kind}/t/{kind}/current").resolve()
    rows = [json.loads(line) for line in (current / "samples.jsonl").read_text().splitlines()]
    scored = 0
    for row in rows:
        low, product = row["sampled_rewards"]["low"], row["sampled_rewards"]["all"]
        assert row["sampled_reward"] == pytest.approx(low + 0.5 * product, abs=1e-4)
        response = row["sampled"].strip()
        if low == 0 or not response.strip(SEPARATOR):
            continue
        wanted = expected(world / "process/model", row["prompt"], response)
        if f"{SEPARATOR}{SEPARATOR}" not in response and response[0] != SEPARATOR != response[-1]:
            assert low == pytest.approx(min(wanted), abs=1e-4)
            scored += 1
    assert scored
    manifest = json.loads((current / "manifest.json").read_text())
    assert manifest["metrics"]["reward_failures"] == {"low": {}, "all": {}}
    assert "process" in manifest["parents"]


@pytest.mark.slow
def test_two_processes_that_split_it_like_one(world):
    words = [*WORDS, "grpo.steps=2"]
    succeed("grpo", "group.yaml", *words, "output=alone", cwd=world)
    split, _ = ranks(world, *words, "grpo.parallel={shard: full}", output="split", kind="grpo", recipe="group.yaml")
    alone = (world / "alone/t/grpo/current").resolve()
    close(split, alone)
    one, two = (
        [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()] for run in (alone, split)
    )
    assert len(one) == len(two) > 0
    for row, other in zip(one, two, strict=True):
        assert (row["sampled"], row["greedy"]) == (other["sampled"], other["greedy"])
        assert row["sampled_rewards"] == pytest.approx(other["sampled_rewards"], abs=1e-5)


@pytest.mark.parametrize(
    "rewards, inputs, message",
    [
        ("r: {function: process, seconds: 3}", "process: ./process", "function: process is the process reward model"),
        ("r: {function: process, arguments: {most: 3}}", "process: ./process", "no argument 'most'; it has combine"),
        (
            "r: {function: process, arguments: {combine: sum}}",
            "process: ./process",
            "'sum' is neither minimum nor product",
        ),
        ("r: {function: process}", "x: ./y", "grpo has no input 'x'"),
        ("r: {function: process}", "process: ./reward", "is not a process reward model"),
        (
            "r: {function: length, arguments: {at_most: 3}}",
            "process: ./process",
            "inputs.process: ./process is not read",
        ),
    ],
)
def test_mistakes_are_one_sentence(world, monkeypatch, rewards, inputs, message):
    monkeypatch.chdir(world)
    words = [f"grpo.inputs={{policy: ./policy, {inputs}}}", f"grpo.rewards={{{rewards}}}", "output=refused"]
    with pytest.raises(UserError) as error:
        run_stage(load("group.yaml", words), "grpo")
    assert message in str(error.value)


@pytest.mark.slow
def test_a_missing_input_is_named(world):
    words = ["grpo.inputs={policy: ./policy}", WORDS[1], "output=missing"]
    code, text = stage("grpo", "group.yaml", *words, cwd=world)
    assert code == 2 and "needs the input 'process', a stage of kind prm" in text and "Traceback" not in text
