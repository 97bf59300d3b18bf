"""Assessing models that were made elsewhere: other tokenizers, plain folders, no pack, no end of text."""

import json
import shutil

import pytest
import tiny
import tuned
from harness import stage
from transformers import PreTrainedTokenizerFast

from pipeline.core.errors import UserError
from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models import build
from pipeline.models.publish import publish, stop_ids
from pipeline.train.scores import reward_scores

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']"
    " | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ASSESS = (
    "name: a\nseed: 1\nstages:\n  assess: {{inputs: {{{inputs}}}, sources: {{nouns: {{path: rows.jsonl, prompt: 'What is"
    " a {{words}} {{noun}}?', answer: '{{kind}}'}}}}, max_prompts: 6, max_new_tokens: 4, samples: 6{keys}}}\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """sft: an alma model; reward: a plain folder of a reward model with another tokenizer; llama3: a model with
    Llama 3's template, without a padding token; endless: without an end of answers; tokens: packed with a third
    tokenizer."""
    here = tmp_path_factory.mktemp("assess")
    tuned.write_rows(here / "rows.jsonl")
    plain = tuned.plain() / "runs/tiny"
    shutil.copytree(plain / "sft/current/model", here / "sft")
    other = tuned.tokenizer(here / "other", sentencepiece=True)
    block = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    block["intermediate_size"] = 32
    model = build.new(block, other, 64, seed=1)
    publish(model.state_dict(), model.config, here / "other", here / "start")
    judge = build.load(here / "start", head="reward", seed=2)
    publish(judge.state_dict(), judge.config, here / "other", here / "reward")
    _foreign(here, "llama3", LLAMA3, LLAMA3_TOKENS[1])
    _foreign(here, "endless", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", None)
    tiny.write_inputs(here, documents=40)
    return here


def _foreign(here, name: str, template: str, eos: str | None) -> None:
    """A model with a tokenizer made elsewhere: no generation marks, no padding token."""
    backend = PreTrainedTokenizerFast.from_pretrained(here / "sft").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=LLAMA3_TOKENS[0], eos_token=eos, extra_special_tokens=LLAMA3_TOKENS[2:]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(here / f"{name}-tokenizer")
    block = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build.new({**block, "intermediate_size": 32}, load_tokenizer(here / f"{name}-tokenizer"), 64, seed=3)
    publish(model.state_dict(), model.config, here / f"{name}-tokenizer", here / name)


def assess(folder, inputs: str, keys: str = "", code: int = 0) -> tuple[dict, str]:
    shutil.rmtree(folder / "runs/a", ignore_errors=True)
    (folder / "a.yaml").write_text(ASSESS.format(inputs=inputs, keys=keys), encoding="utf-8")
    exit_code, output = stage("assess", "a.yaml", cwd=folder)
    assert exit_code == code and "Traceback" not in output, output
    report = folder / "runs/a/assess/current/report.json"
    return json.loads(report.read_text()) if code == 0 else {}, output


def test_a_reward_model_reads_text_with_its_own_tokenizer(folder):
    """Correctness 15: without a pack, with a plain reward folder whose tokenizer is not the model's."""
    report, _ = assess(folder, "sft: ./sft, reward: ./reward")
    metrics = json.loads((folder / "runs/a/assess/current/manifest.json").read_text())["metrics"]
    assert "bits_per_byte" not in report["models"]["sft"] and "(n=6)" in metrics["summary"]["measure"]
    samples = [json.loads(line) for line in (folder / "runs/a/assess/current/samples.jsonl").read_text().splitlines()]
    chat = Chat(load_tokenizer(folder / "reward"))  # alma's own template: marked
    rows = []
    for sample in samples:
        turns = [{"role": "user", "content": sample["prompt"]}, {"role": "assistant", "content": sample["sft"]}]
        rows.append(chat.encode([turns])[0].ids)
    judge = build.load(folder / "reward", head="judge")
    judge.config.pad_token_id = 0
    rewards = reward_scores(judge, rows).tolist()
    assert len(rewards) == 6 and report["models"]["sft"]["reward"] == pytest.approx(sum(rewards) / 6, abs=1e-5)


def test_the_same_tokenizer_is_read_as_ids(folder):
    """Alma's own reward model still reads the very ids that the model wrote."""
    shutil.copytree(tuned.plain() / "runs/tiny/reward/current/model", folder / "own", dirs_exist_ok=True)
    report, _ = assess(folder, "sft: ./sft, reward: ./own")
    assert report["models"]["sft"]["answers"] == 6 and report["models"]["sft"]["end_of_turn_rate"] == 1.0


def test_llama3_answers_and_ends_its_turn(folder):
    """Correctness 15: its template has no marks, and it has no padding token and no <|im_end|>."""
    report, _ = assess(folder, "llama3: ./llama3, sft: ./sft, reward: ./reward", ", compare: [[sft, llama3]]")
    assert report["models"]["llama3"]["answers"] == 6 and report["win_rates"]["sft over llama3"]["prompts"] == 6
    tokenizer = load_tokenizer(folder / "llama3")
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert stop_ids(folder / "llama3", tokenizer) == ends


def test_a_model_without_an_end(folder):
    """None was sorted among integers."""
    assert stop_ids(folder / "endless", load_tokenizer(folder / "endless")) == []
    model = assess(folder, "endless: ./endless, reward: ./reward")[0]["models"]["endless"]
    assert model["end_of_turn_rate"] is None and model["answer_tokens"] == 4


def test_tokens_of_another_tokenizer_are_refused(folder):
    """Correctness 15: bits per byte of ids that mean other text to the model. Without them it is measured."""
    keys = ", sequence_length: 32"
    output = assess(folder, "tokens: ./tokens, sft: ./sft", keys, code=2)[1]
    assert "was packed with another tokenizer than that of sft" in output and "max_rows: 0" in output
    moved = shutil.copytree(folder / "tokens", folder / "moved")  # nothing says which tokenizer packed it
    (moved / "manifest.json").unlink()
    assert "than that of sft" in assess(folder, "tokens: ./moved, sft: ./sft", keys, code=2)[1]
    report, _ = assess(folder, "tokens: ./tokens, sft: ./sft", ", max_rows: 0")
    assert "perplexity" not in report["models"]["sft"] and report["prompts"] == 6


@pytest.mark.parametrize("packed", ["tokens", "moved"])
def test_tokens_of_the_same_tokenizer_are_accepted(folder, packed):
    """Also where the folder of the tokenizer is gone. Rows are as long as the model has positions."""
    if packed == "moved":
        shutil.copytree(folder / "tokens", folder / "own-pack", dirs_exist_ok=True)
        (folder / "own-pack/manifest.json").unlink()
        packed = "own-pack"
    tokenizer = load_tokenizer(folder / "tokenizer")
    block = {"family": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = build.new(block, tokenizer, 48, seed=3)
    publish(model.state_dict(), model.config, folder / "tokenizer", folder / "gpt2")
    report, _ = assess(folder, f"tokens: ./{packed}, gpt2: ./gpt2", ", max_rows: 4")
    assert report["models"]["gpt2"]["heldout_tokens"] == 4 * 48
    output = assess(folder, f"tokens: ./{packed}, gpt2: ./gpt2", ", sequence_length: 64", code=2)[1]
    assert "64 is more than the 48 positions of gpt2" in output


def test_a_reward_folder_without_a_score_layer_is_refused(folder):
    """Its scores would be drawn at random."""
    output = assess(folder, "sft: ./sft, reward: ./start", code=2)[1]
    assert "is not a reward model: it has no score layer" in output


def test_prompts_that_leave_no_room_are_counted(folder):
    """Positions beyond the model's crashed."""
    (folder / "a.yaml").write_text(
        ASSESS.format(inputs="sft: ./sft", keys="").replace("max_new_tokens: 4", "max_new_tokens: 60")
    )
    exit_code, output = stage("assess", "a.yaml", cwd=folder)
    assert exit_code == 2 and "none of" in output and "64 positions" in output and "Traceback" not in output


def test_a_classifier_of_many_labels_is_refused(folder):
    """Which of its scores would be the reward?"""
    shutil.copytree(folder / "reward", folder / "classifier")
    config = json.loads((folder / "classifier/config.json").read_text())
    config |= {"id2label": {"0": "bad", "1": "so so", "2": "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}
    (folder / "classifier/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gives 3 scores per sequence"):
        build.load(folder / "classifier", head="judge")


def test_dropped_records_are_reported(folder):
    """Also where nothing is learned from them."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [*rows, *({"text": str(index)} for index in range(len(rows)))]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "half.jsonl").write_text(text, encoding="utf-8")
    recipe = ASSESS.format(inputs="sft: ./sft", keys="").replace("rows.jsonl", "half.jsonl")
    shutil.rmtree(folder / "runs/a", ignore_errors=True)
    (folder / "half.yaml").write_text(recipe, encoding="utf-8")
    code, output = stage("assess", "half.yaml", cwd=folder)
    assert code == 0 and "WARNING sources.nouns" in output and "(50%) dropped: no field 'words'" in output, output


def test_speed_memorised_text_and_refusals(folder):
    """Of one model, without prompts and held-out rows: figures in the report, answers in a file."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = build.new({"family": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}, tokenizer, 64, seed=3)
    publish(model.state_dict(), model.config, folder / "tokenizer", folder / "probed")
    (folder / "requests.jsonl").write_text('{"prompt": "Hi", "kind": "harmless", "language": "en"}\n')
    keys = (
        "{inputs: {tokens: ./tokens, probed: ./probed}, max_rows: 0, memorised: {samples: 6, prefix: 8, continuation: 4},"
        " refusals: {file: requests.jsonl, max_new_tokens: 4},"
        " speed: {prompt_tokens: 4, new_tokens: 4, batches: [2], repeats: 1}}"
    )
    (folder / "p.yaml").write_text(f"name: p\nseed: 1\nstages:\n  assess: {keys}\n")
    code, output = stage("assess", "p.yaml", cwd=folder)
    assert code == 0, output
    published = folder / "runs/p/assess/current"
    figures = json.loads((published / "report.json").read_text())["models"]["probed"]
    assert figures["memorised"]["train"]["n"] == 6 and figures["refusals"]["harmless"]["n"] == 1
    assert figures["speed"]["batches"]["2"]["tokens_per_second"] > 0
    [answer] = [json.loads(line) for line in (published / "refusals/probed.jsonl").read_text().splitlines()]
    assert answer["prompt"] == "Hi" and answer["refused"] is False
    metrics = json.loads((published / "manifest.json").read_text())["metrics"]
    assert "probed 0% memorised (n=6)" in metrics["summary"]["measure"]
