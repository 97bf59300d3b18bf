"""`alma chat`: what it answers is what transformers generates, and what it refuses is one sentence."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time

import pytest
import torch
import tuned

from pipeline import cli
from pipeline.core.errors import UserError
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.serve.chat import Conversation, speaker
from pipeline.serve.generator import Generator, Sampling
from pipeline.serve.target import Target, resolve

QUESTIONS = ["What is a red cat?", "什么是竹子？", "And a <|im_end|> horse?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a chat model (sft) and a base model without template (pretrain)."""
    home = tmp_path_factory.mktemp("chat")
    tuned.base(home / "base", length=256)
    base = home / "base/model"
    (home / "runs/x").mkdir(parents=True)
    for stage, kind in (("sft", "sft"), ("pretrain", "pretrain"), ("judge", "reward")):
        output = home / "runs/x" / stage / "0123456789ab"
        shutil.copytree(base, output / "model")
        if kind == "pretrain":
            (output / "model/chat_template.jinja").unlink()
        _manifest(output, stage, kind)
        (output.parent / "current").symlink_to(output.name)
    return home / "runs/x"


def _manifest(output, stage, kind):
    from pipeline.core.artifact import SCHEMA_VERSION, content_files, digest_of
    from pipeline.core.files import hash_files

    files = hash_files(output, content_files(output))
    manifest = {"schema_version": SCHEMA_VERSION, "stage": stage, "kind": kind, "version": 1, "fingerprint": "0" * 64}
    manifest |= {"identity": {}, "parents": {}, "config": {}, "files": files, "digest": digest_of(files)}
    (output / "manifest.json").write_text(json.dumps({**manifest, "metrics": {}, "seconds": 1.0}))


def chat(*words: str, text: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    cli.app(["chat", *map(str, words)], standalone_mode=False)


def expected_answers(folder, questions: list[str], length: int, system: str = "") -> list[str]:
    """By transformers alone: greedy, each question after the answers before it."""
    from transformers import AutoModelForCausalLM

    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=length, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(made, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_several_turns_are_those_of_transformers(run, monkeypatch, capsys):
    """Through a pipe: answers on standard output, one after the other, and nothing else."""
    folder = resolve(f"{run}:sft").folder
    chat(f"{run}:sft", "--max-new-tokens", "7", text="\n".join(QUESTIONS[:2]), monkeypatch=monkeypatch)
    shown = capsys.readouterr()
    assert shown.out == "".join(f"{answer}\n" for answer in expected_answers(folder, QUESTIONS[:2], 7))
    assert "parameters, fp32 on cpu, 256 positions, greedy" in shown.err and "cut off after 7 tokens" in shown.err


def test_commands_change_the_conversation(run, monkeypatch, capsys):
    folder = resolve(f"{run}:sft").folder
    lines = [QUESTIONS[0], "/reset", QUESTIONS[1], "/system Be brief.", QUESTIONS[1], "/exit", "never asked"]
    chat(run, "--max-new-tokens", "5", text="\n".join(lines), monkeypatch=monkeypatch)
    asked = [expected_answers(folder, [question], 5)[0] for question in QUESTIONS[:2]]
    asked += expected_answers(folder, [QUESTIONS[1]], 5, "Be brief.")
    shown = capsys.readouterr()
    assert shown.out == "".join(f"{answer}\n" for answer in asked)
    assert f"{run}:sft: " in shown.err  # the stage that a run's folder means


def test_a_base_model_continues_texts_and_says_so(run, monkeypatch, capsys):
    """Side by side with the chat model, which has the same weights."""
    from transformers import AutoModelForCausalLM

    text = "What is a"
    chat(
        f"{run}:pretrain", "--with", f"{run}:sft", "--max-new-tokens", "4", "--once", text=text, monkeypatch=monkeypatch
    )
    shown = capsys.readouterr()
    folder = resolve(f"{run}:pretrain").folder
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=4, do_sample=False)[0]
    continued = tokenizer.decode(made, skip_special_tokens=True)[len(text) :]
    [answer] = expected_answers(resolve(f"{run}:sft").folder, [text], 4)
    assert shown.out == f"{run}:pretrain:\n{continued}\n{run}:sft:\n{answer}\n"
    assert "is a base model: it continues the text that you write instead of answering it" in shown.err
    with pytest.raises(UserError, match="has no chat template, so it takes no --system"):
        chat(f"{run}:pretrain", "--system", "Be brief.", text="", monkeypatch=monkeypatch)


def test_tokens_spelled_out_in_a_message_stay_text(run):
    """What a user types cannot end a turn (docs/chat.md)."""
    generator = Generator(resolve(f"{run}:sft").folder)
    ids = generator.prompt([{"role": "user", "content": QUESTIONS[2]}])
    end = generator.chat.end_id
    assert ids.count(end) == generator.prompt([{"role": "user", "content": "x"}]).count(end)
    assert generator.tokenizer.decode(ids).count("<|im_end|>") == ids.count(end) + 1


def sampled(generator: Generator, seeds: list[int], **how) -> list[list]:
    rows = [[] for _ in seeds]
    ids = generator.text_prompt("What is a")
    generator.generate(ids, Sampling(**how), seeds, lambda row, token: rows[row].append(token), stop_ids=[])
    return rows


@pytest.fixture(scope="module")
def generator(run):
    return Generator(resolve(f"{run}:pretrain").folder)


def test_nothing_is_continued_after_the_end_of_a_text(generator):
    """As each document of packed rows begins; no row has alma's bos."""
    assert generator.tokenizer.bos_token == "<|bos|>"
    assert generator.text_prompt("") == [generator.tokenizer.convert_tokens_to_ids("<|eos|>")]


def test_a_seed_decides_an_answer_whatever_is_in_its_batch(generator):
    together = sampled(generator, [1, 2, 1, 3], max_new_tokens=12)
    ids = [[token.id for token in row] for row in together]
    assert ids[0] == ids[2] and len({tuple(row) for row in ids}) == 3
    for seed, row in zip((1, 2, 3), (ids[0], ids[1], ids[3]), strict=True):
        torch.manual_seed(seed + 100)  # not read
        assert [token.id for token in sampled(generator, [seed], max_new_tokens=12)[0]] == row


def test_sampling_follows_the_distribution(generator):
    """Of 4,000 first tokens: shares are those of the softmax at this temperature, cut to the top k or the mass p.
    Tolerance: five standard deviations of a share."""
    prompt = torch.tensor([generator.text_prompt("What is a")])
    logits = generator.model(input_ids=prompt).logits[0, -1].detach().float()
    probabilities = (logits / 0.7).softmax(-1)
    order = probabilities.argsort(descending=True)
    top_k = torch.zeros_like(probabilities)
    top_k[order[:5]] = probabilities[order[:5]]
    mass = probabilities[order].cumsum(-1)
    kept = order[: int((mass < 0.4).sum()) + 1]  # the fewest that have this mass
    top_p = torch.zeros_like(probabilities)
    top_p[kept] = probabilities[kept]
    for how, weights in (({}, probabilities), ({"top_k": 5}, top_k), ({"top_p": 0.4}, top_p)):
        rows = sampled(generator, list(range(4000)), max_new_tokens=1, temperature=0.7, **how)
        counts = torch.bincount(torch.tensor([row[0].id for row in rows]), minlength=len(logits))
        share = weights / weights.sum()
        error = (counts / 4000 - share).abs()
        assert (error <= 5 * (share * (1 - share) / 4000).sqrt() + 1e-9).all(), how
    [[token]] = sampled(generator, [0], max_new_tokens=1, temperature=0, top_logprobs=3)
    expected = logits.log_softmax(-1)
    assert [index for index, _ in token.top] == order[:3].tolist() and token.id == order[0]
    assert token.logprob == pytest.approx(expected.max().item(), abs=1e-5) == token.top[0][1]


def test_stop_texts_and_characters_of_several_tokens(generator):
    """A text at which the answer ends is no part of it, wherever tokens divide it; what is shown never changes later,
    and all pieces together are the decoded text."""
    [row] = sampled(generator, [5], max_new_tokens=60)
    prompt = generator.text_prompt("What is a")
    complete = generator.tokenizer.decode(prompt + [token.id for token in row])[len("What is a") :]
    assert "".join(token.text for token in row) == complete and row[-1].finish == "length"
    for begin, length in ((10, 1), (20, 3), (33, 6)):
        stop = complete[begin : begin + length]
        [cut] = sampled(generator, [5], max_new_tokens=60, stop=("never", stop))
        assert "".join(token.text for token in cut) == complete[: complete.index(stop)], stop
        assert cut[-1].finish == "stop"


def test_penalties_are_openais_and_transformers_formula(generator):
    from transformers import AutoModelForCausalLM

    ids = generator.text_prompt("What is a")
    [row] = sampled(generator, [0], max_new_tokens=20, temperature=0, frequency_penalty=0.7, presence_penalty=0.3)
    answer: list[int] = []
    for token in row:
        logits = generator.model(input_ids=torch.tensor([ids + answer])).logits[0, -1].detach().float()
        for index in set(answer):
            logits[index] -= 0.7 * answer.count(index) + 0.3
        assert token.id == logits.argmax()
        answer.append(token.id)
    [row] = sampled(generator, [0], max_new_tokens=20, temperature=0, repetition_penalty=1.4)
    other = AutoModelForCausalLM.from_pretrained(generator.tokenizer.name_or_path)
    made = other.generate(
        torch.tensor([ids]), max_new_tokens=20, repetition_penalty=1.4, do_sample=False, eos_token_id=None
    )
    assert [token.id for token in row] == made[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("{run}:judge", "is a reward model"),
        ("{run}:dpo", "dpo is no stage of this run; stages with a model that can be talked to: pretrain, sft"),
        ("{run}:../x", "is not the name of a stage"),
        ("{run}/sft/nowhere", "there is no such folder"),
        ("nowhere:sft", "there is no such folder"),
        ("Qwen/Qwen3-0.6B", "is named with its revision"),
        ("{home}", "contains no model and no stage that published one"),
        ("{run}/../../r.yaml", "is a recipe"),
    ],
)
def test_what_is_no_model_is_refused(name, sentence, run):
    (run.parents[1] / "r.yaml").write_text("name: x\n")
    (run.parents[1] / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        resolve(name.format(run=run, home=run.parents[1] / "empty"))
    assert sentence in str(caught.value)


def test_a_damaged_output_and_a_long_conversation_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "x", symlinks=True)
    weights = tmp_path / "x/sft/current/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="sft: is damaged: .*model.safetensors"):
        resolve(f"{tmp_path}/x:sft")
    target = resolve(f"{run}:sft")
    one = speaker(target, {"max_new_tokens": 300, "temperature": 0.0}, {}, "", "cpu", "auto")
    conversation = Conversation([one], 0, interactive=False)
    with pytest.raises(UserError, match="the prompt has [0-9]+ tokens, and the model has 256 positions"):
        conversation.ask("a red cat " * 100)
    assert one.messages == []
    with pytest.raises(UserError, match="the chat template does not know `loud`"):
        speaker(Target("x", target.folder), {}, {"loud": True}, "", "cpu", "auto")


@pytest.mark.slow
def test_on_a_terminal(run):
    """An answer, a mistake that does not end the conversation, and Ctrl-D, which does."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "pipeline.cli", "chat", f"{run}:sft", "--max-new-tokens", "9"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown, place = b"", 0

    def until(mark: bytes) -> None:
        """Read up to the next `mark` after the last one."""
        nonlocal shown, place
        deadline = time.time() + 100
        while (found := shown.find(mark, place)) < 0:
            assert time.time() < deadline, shown.decode()
            shown += os.read(leader, 4096)
        place = found + len(mark)

    for typed, mark in ((QUESTIONS[0], b"per second]"), ("/shout", b"/shout is no command"), ("/reset", b"forgotten")):
        until(b"> ")
        os.write(leader, f"{typed}\n".encode())
        until(mark)
    until(b"> ")
    os.write(leader, b"\x04")
    assert process.wait(60) == 0
    [answer] = expected_answers(resolve(f"{run}:sft").folder, QUESTIONS[:1], 9)
    assert answer.strip() in shown.decode().replace("\r\n", "\n")
