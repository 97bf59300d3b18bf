"""Tasks of stage assess against lm-eval itself: the same scores as its own evaluation of the same folder."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import tuned
from harness import files_of, stage, succeed
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from pipeline.assessment import task_files
from pipeline.assessment.inputs import candidate
from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models import build

pytest.importorskip("lm_eval")
from pipeline.assessment.harness import open_model  # noqa: E402 - imports lm_eval

CHOICE = """\
task: kinds
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "What is a {{words}} {{noun}}?"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """\
include: kinds.yaml
task: written
output_type: generate_until
doc_to_text: !function spelling.question
doc_to_target: "{{kind}}"
doc_to_choice: null
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
FUNCTIONS = "def question(doc):\n    return f\"Q: {doc['noun']}\\nA:\"\n"
RECIPE = """\
name: t
stages:
  assess:
    inputs: {base: ./base/model}
    batch: 5
    tasks:
      kinds: {file: kinds.yaml, limit: 20}
      shots: {file: kinds.yaml, few_shot: 2, limit: 20}
      chat: {file: kinds.yaml, few_shot: 1, limit: 12, chat_template: true, system: Be brief.}
      written: {file: written.yaml, limit: 6}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that knows nothing, two task files and their data, and an assessment by them."""
    folder = tmp_path_factory.mktemp("tasks")
    tuned.base(folder / "base", length=256)
    rows = []
    for row in tuned.rows()[:60]:
        kinds = list(tuned.KINDS)
        rows.append(row | {"choices": kinds, "label": kinds.index(row["kind"])})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines[40:]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    (folder / "kinds.yaml").write_text(CHOICE)
    (folder / "written.yaml").write_text(WRITTEN)
    (folder / "spelling.py").write_text(FUNCTIONS)
    (folder / "t.yaml").write_text(RECIPE)
    before = os.getcwd()
    os.chdir(folder)
    run_stage(load("t.yaml"), "assess")
    os.chdir(before)
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # lists all packages, for seconds
    return world


def published(world) -> dict:
    return json.loads((world / "runs/t/assess/current/manifest.json").read_text())["metrics"]["models"]["base"]


def opened(folder):
    """A model's folder as the stage gives it to lm-eval."""
    artifact = SimpleNamespace(path=folder, manifest={})
    return open_model(candidate("base", artifact, SimpleNamespace(sources={}, date=None, refusals=None)), 2)


def by_lm_eval(file: str, **options) -> dict:
    """lm-eval's own evaluation of the model's folder."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        "hf",
        model_args={"pretrained": "base/model", "dtype": "float32"},
        tasks=[file],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=3,
        **options,
    )


@pytest.mark.parametrize(
    "key, file, options",
    [
        ("kinds", "kinds.yaml", {"limit": 20}),
        ("shots", "kinds.yaml", {"limit": 20, "num_fewshot": 2}),
        (
            "chat",
            "kinds.yaml",
            {
                "limit": 12,
                "num_fewshot": 1,
                "apply_chat_template": True,
                "system_instruction": "Be brief.",
                "fewshot_as_multiturn": True,
            },
        ),
        ("written", "written.yaml", {"limit": 6}),
    ],
)
def test_the_same_as_lm_eval_itself(here, key, file, options):
    """Scores, standard errors, prompts and answers; log-probabilities to 1e-4, because the batches are others."""
    expected = by_lm_eval(file, **options)
    name = next(iter(expected["results"]))
    theirs, ours = expected["results"][name], published(here)["tasks"][key][name]
    for metric, numbers in ours["metrics"].items():
        assert numbers["value"] == pytest.approx(theirs[f"{metric},none"], abs=1e-9)
        assert numbers["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"], abs=1e-9)
        assert -1e-9 <= numbers["low"] - 1e-9 <= numbers["value"] <= numbers["high"] + 1e-9 <= 1 + 2e-9
    assert ours["questions"] == options["limit"] and ours["few_shot"] == options.get("num_fewshot", 0)
    lines = (here / f"runs/t/assess/current/tasks/base/{key}.jsonl").read_text().splitlines()
    samples = expected["samples"][name]
    assert len(lines) == len(samples)
    for line, sample in zip(map(json.loads, lines), samples, strict=True):
        assert line["prompt"] == sample["arguments"][0][0] and line["doc"] == sample["doc_id"]
        for answer, theirs_ in zip(line["answers"], [one for group in sample["resps"] for one in group], strict=True):
            if isinstance(answer, str):
                assert answer == theirs_
            else:
                assert math.isclose(answer[0], theirs_[0], abs_tol=1e-4) and answer[1] == theirs_[1]


def test_differences_on_the_same_questions(here):
    """Zero examples against two on the same 20 questions, and against the chat template on the first 12 of them."""
    current = here / "runs/t/assess/current"
    rows = json.loads((current / "tasks.json").read_text())["differences"]
    found = {(row["first"], row["second"], row["metric"]): row for row in rows}
    scores = {key: published(here)["tasks"][key]["kinds"]["metrics"]["acc"]["value"] for key in ("kinds", "shots")}
    row = found["kinds", "shots", "kinds acc"]
    assert row["questions"] == 20 and row["difference"] == pytest.approx(scores["shots"] - scores["kinds"], abs=1e-9)
    assert row["low"] <= row["difference"] <= row["high"]
    lines = {}
    for key in ("kinds", "chat"):
        text = (current / f"tasks/base/{key}.jsonl").read_text()
        lines[key] = {line["doc"]: line["scores"]["acc"] for line in map(json.loads, text.splitlines())}
    common = lines["kinds"].keys() & lines["chat"].keys()
    expected = sum(lines["chat"][doc] - lines["kinds"][doc] for doc in common) / len(common)
    row = found["kinds", "chat", "kinds acc"]
    assert row["questions"] == len(common) == 12 and row["difference"] == pytest.approx(expected, abs=1e-9)
    assert not any("written" in pair for *pair, _ in found), "another task"
    assert "| base | kinds | shots | kinds acc |" in (current / "tasks.md").read_text()


def test_examples_and_the_template_are_in_the_prompt(here):
    def prompt(key: str) -> str:
        return json.loads((here / f"runs/t/assess/current/tasks/base/{key}.jsonl").read_text().splitlines()[0])[
            "prompt"
        ]

    assert prompt("kinds").count("What is a") == 1 and prompt("shots").count("What is a") == 3
    assert prompt("chat").count("<|im_start|>user") == 2 and "Be brief." in prompt("chat")
    assert prompt("written").startswith("Q: "), "by the function of the task file"


BEGINS = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.mark.parametrize("begins", [False, True])
def test_the_ids_are_those_of_training(here, begins):
    """What a model reads of a task's prompt in its chat template, against the ids that its finetuning stages make of
    the same conversation. begins: tokenizer and template both write a token at the beginning, as Llama 3's do."""
    folder = here / "base/model"
    if begins:
        folder = shutil.copytree(folder, here / "begins")
        tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<|eos|>", chat_template=BEGINS)
        begin = ("<|eos|>", tokenizer.convert_tokens_to_ids("<|eos|>"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|eos|> $A", special_tokens=[begin])
        tokenizer.save_pretrained(folder)
        assert load_tokenizer(folder)("a")["input_ids"][0] == begin[1], "the tokenizer writes it, too"
    model = opened(folder)
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a old cat?"},
        {"role": "assistant", "content": "animal"},
        {"role": "user", "content": "很大 小猫 是什么？"},
    ]
    text = model.apply_chat_template(history)
    expected = Chat(load_tokenizer(folder), trained=False).prompt(history)
    assert model.model.tok_encode(text) == expected
    [batch] = [ids.tolist() for ids in model.model.tok_batch_encode([text])[0]]
    assert batch == expected, "as requests for generated answers are encoded"


def test_the_date_of_a_template_is_that_of_the_stage(here):
    """A template asks for today's; a result that depends on the day could not be repeated."""
    folder = shutil.copytree(here / "base/model", here / "dated")
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('Today: %d %b %Y. ') }}" + template.read_text(encoding="utf-8"), "utf-8")
    keys = "tasks: {a: {file: kinds.yaml, limit: 2, chat_template: true}}"
    for date, written in (("", "26 Jul 2024"), (", date: 2025-01-05", "05 Jan 2025")):
        (here / "dated.yaml").write_text(
            f"name: dated\nstages:\n  assess: {{inputs: {{base: ./dated}}, {keys}{date}}}\n"
        )
        run_stage(load("dated.yaml"), "assess")
        lines = (here / "runs/dated/assess/current/tasks/base/a.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 2
        for line in lines:
            assert json.loads(line)["prompt"].startswith(f"Today: {written}. ")


def test_a_text_with_nothing_in_front_is_scored_after_the_end_of_a_text(here):
    """As documents begin in packed rows, against transformers."""
    from lm_eval.api.instance import Instance

    model = opened(here / "base/model")
    text = "What is a old cat?"
    [(found, _)] = model.loglikelihood([Instance("loglikelihood", {}, ("", text), 0)])
    tokenizer = AutoTokenizer.from_pretrained(here / "base/model")
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids("<|eos|>"), *tokenizer(text).input_ids]])
    with torch.no_grad():
        logprobs = build.load(here / "base/model").eval()(ids).logits[0].log_softmax(-1)
    expected = sum(logprobs[place, ids[0, place + 1]].item() for place in range(ids.shape[1] - 1))
    assert found == pytest.approx(expected, abs=1e-4)


STRICT = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}SYSTEM{%- endif -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def test_a_system_message_that_the_template_refuses_or_drops(here):
    """lm-eval would ask without it."""
    shutil.copytree(here / "base/model", here / "strict")
    keys = "tasks: {a: {file: kinds.yaml, limit: 2, chat_template: true, system: Be brief.}}"
    for handling, message in (
        ("{{ raise_exception('no system, please') }}", "refuses a conversation of system, user: no system, please"),
        ("{%- continue -%}", "assess.tasks.a.system: the chat template of base leaves it out"),
    ):
        (here / "strict/chat_template.jinja").write_text(STRICT.replace("SYSTEM", handling))
        assert message in refusal(here, keys, "./strict")


def test_tables_and_cards(here):
    import yaml

    current = here / "runs/t/assess/current"
    table = (current / "tasks.md").read_text()
    score = published(here)["tasks"]["kinds"]["kinds"]["metrics"]["acc"]
    assert f"| kinds | acc | 20 | 0 | {score['value']:.4g} [" in table and "| chat | acc | 12 | 1, chat |" in table
    front = yaml.safe_load((current / "cards/base.md").read_text().split("---")[1])
    results = front["model-index"][0]["results"]
    shown = {result["dataset"]["name"]: result["metrics"] for result in results}
    assert shown["kinds"][0]["value"] == pytest.approx(score["value"], abs=1e-6)
    manifest = json.loads((current / "manifest.json").read_text())
    assert "kinds acc" in manifest["metrics"]["summary"]["measure"]
    assert published(here)["kinds acc"] == score["value"]


def test_what_the_model_has_no_room_for_is_counted(here, capsys):
    """Questions of about 15 and of more than 256 tokens."""
    long = "{{ (words ~ ' ') * (300 if label == 0 else 1) }}"
    (here / "cut.yaml").write_text(CHOICE.replace("{{words}}", long))
    recipe = "name: cut\nstages:\n  assess: {inputs: {base: ./base/model}, tasks: {a: {file: cut.yaml, limit: 9}}}\n"
    (here / "cut.yml").write_text(recipe)
    run_stage(load("cut.yml"), "assess")
    tasks = json.loads((here / "runs/cut/assess/current/tasks.json").read_text())
    assert tasks["models"]["base"]["a"]["cut_requests"] == 9, "three questions of three answers"
    assert "9 requests longer than the model's 256 positions" in capsys.readouterr().out


@pytest.mark.slow
def test_names_of_lm_eval(here):
    with pytest.raises(UserError) as error:
        task_files.check({"hellaswog": task_files.Task()})
    assert "did you mean hellaswag" in str(error.value)
    task_files.check({"x": task_files.Task(task="arc_easy")})


@pytest.mark.slow
def test_killed_like_one_that_was_not(here, tmp_path):
    """Before and after a task is written: what was finished is not asked again, and the files are the same bytes."""
    for name in ("base", "kinds.yaml", "written.yaml", "spelling.py", "train.jsonl", "test.jsonl", "t.yaml"):
        copy = shutil.copytree if (here / name).is_dir() else shutil.copy
        copy(here / name, tmp_path / name)
    for fault in ("task:4", "task:3"):
        assert stage("assess", "t.yaml", cwd=tmp_path, fault=fault)[0] == -9
    text = succeed("assess", "t.yaml", cwd=tmp_path)
    assert "assess: base, written" in text and "assess: base, kinds" not in text
    one, two = (files_of(folder / "runs/t/assess/current") for folder in (here, tmp_path))
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == set()


@pytest.mark.slow
def test_two_processes_share_the_requests(here):
    """The same table as one process; log-probabilities differ in their last bits, as the batches are others."""
    words = ["assess.run.processes=2", "assess.max_rows=0", "name=two"]
    command = [sys.executable, "-m", "pipeline.cli", "run", "t.yaml", *words]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    one, two = (here / f"runs/{name}/assess/current" for name in ("t", "two"))
    assert (one / "tasks.md").read_text() == (two / "tasks.md").read_text()
    assert json.loads((two / "manifest.json").read_text())["processes"] == 2


def refusal(world, keys: str, model: str = "./base/model") -> str:
    (world / "bad.yaml").write_text(f"name: bad\nstages:\n  assess: {{inputs: {{base: {model}}}, {keys}}}\n")
    with pytest.raises(UserError) as error:
        run_stage(load("bad.yaml"), "assess")
    return str(error.value)


def test_what_cannot_be_asked_is_one_sentence(here):
    (here / "no.yaml").write_text("a: 1\n")
    (here / "torn.yaml").write_text("a: [1\n")
    (here / "gone.yaml").write_text(CHOICE.replace("train.jsonl", "gone.jsonl"))
    (here / "broken.yaml").write_text(CHOICE.replace("{{noun}}", "{{noun"))
    (here / "bare.yaml").write_text(CHOICE + "num_fewshot: 0\n")
    long = WRITTEN.replace("max_gen_toks: 6", "max_gen_toks: 600")
    (here / "long.yaml").write_text(long)
    for keys, message in (
        ("tasks: {a: {file: nowhere.yaml}}", "tasks.a: nowhere.yaml"),
        ("tasks: {a: {file: no.yaml}}", "is not a task of lm-eval"),
        ("tasks: {a: {file: torn.yaml}}", "is not YAML"),
        ("tasks: {a: {file: gone.yaml}}", "gone.jsonl does not exist"),
        ("tasks: {a: {file: bare.yaml, few_shot: 3}}", "is defined without examples"),
        ("tasks: {a: {file: long.yaml}}", "leave no room for a question in the 256 positions of base"),
        ("tasks: {a: {file: broken.yaml}}", "lm-eval cannot load broken.yaml"),
        ("tasks: {a: {file: kinds.yaml, task: b}}", "give task or file, not both"),
        ("tasks: {a: {few_shots: 1}}", "few_shot"),
    ):
        assert message in refusal(here, keys), keys
