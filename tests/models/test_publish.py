"""What a published model folder says of generation: the parent's settings, and where answers end."""

import json
import shutil

import pytest
import tuned
from harness import succeed
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from pipeline.core.errors import UserError
from pipeline.data.chat.answers import ends_of_turn
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models import build
from pipeline.models.publish import generation_settings, publish, stop_ids

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "</s>"]
HEADERS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A model made elsewhere: no generation marks in its template, no padding token, its own generation settings."""
    folder = tmp_path_factory.mktemp("parent")
    backend = tuned.tokenizer(folder / "bare").backend_tokenizer
    tokens = dict(bos_token=SPECIAL[0], eos_token=SPECIAL[1], additional_special_tokens=SPECIAL[2:])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    made.chat_template = HEADERS
    made.save_pretrained(folder / "tokenizer")
    block = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build.new({**block, "intermediate_size": 32}, load_tokenizer(folder / "tokenizer"), 64, seed=1)
    publish(model.state_dict(), model.config, folder / "tokenizer", folder / "model")
    return folder / "model"


def published(parent, folder, settings: dict | None, changes: dict | None = None) -> dict:
    """generation_config.json after a model of `parent` with these settings was published again."""
    here = shutil.copytree(parent, folder / "parent")
    (here / "generation_config.json").unlink()
    if settings is not None:
        (here / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(config | (changes or {})))
    model = build.load(here)
    publish(model.state_dict(), model.config, here, folder / "made")
    assert AutoModelForCausalLM.from_pretrained(folder / "made").generation_config.eos_token_id
    return json.loads((folder / "made/generation_config.json").read_text())


def ids(parent, *tokens) -> list[int]:
    return load_tokenizer(parent).convert_tokens_to_ids(list(tokens))


def test_settings_of_the_parent_are_kept(parent, tmp_path):
    """Correctness 14: a Llama-3 model lost its turn end and its sampling defaults."""
    end, turn = ids(parent, "<|end_of_text|>", "<|eot_id|>")
    settings = {"bos_token_id": 3, "eos_token_id": [end, turn], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    settings |= {"max_length": 4096, "transformers_version": "4.40.0.dev0"}
    found = published(parent, tmp_path, settings)
    assert found == settings
    assert GenerationConfig.from_pretrained(tmp_path / "made").temperature == 0.6


def test_the_end_of_turn_is_added(parent, tmp_path):
    """Correctness 14: a base model whose settings name the end of text alone."""
    end, turn = ids(parent, "<|end_of_text|>", "<|eot_id|>")
    # temperature without do_sample is what transformers refuses to save (llama-2-chat was published so)
    settings = {"eos_token_id": end, "temperature": 0.9, "_from_model_config": True, "pad_token_id": 0}
    found = published(parent, tmp_path, settings)
    assert found["eos_token_id"] == [end, turn] and found["temperature"] == 0.9 and found["pad_token_id"] == 0
    assert "_from_model_config" not in found and found["bos_token_id"] == ids(parent, "<|begin_of_text|>")[0]


def test_ends_come_from_config_json_where_there_are_no_settings(parent, tmp_path):
    """Correctness 14: older folders say in config.json where generation ends."""
    turn, other = ids(parent, "<|eot_id|>", "<|end|>")
    assert published(parent, tmp_path, None, {"eos_token_id": [other]})["eos_token_id"] == [other, turn]


def test_a_model_without_any_end_stops_at_the_turn(parent, tmp_path):
    """Correctness 38: neither settings, nor configuration, nor tokenizer name an end."""
    here = shutil.copytree(parent, tmp_path / "parent")
    (here / "generation_config.json").unlink()
    config = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    tokenizer = load_tokenizer(here)
    tokenizer.eos_token = None
    assert stop_ids(here, tokenizer) == ids(parent, "<|eot_id|>")
    tokenizer.chat_template = None
    assert stop_ids(here, tokenizer) == []
    assert "eos_token_id" not in generation_settings(here, tokenizer)


def test_damaged_settings_name_their_file(parent, tmp_path):
    here = shutil.copytree(parent, tmp_path / "parent")
    (here / "generation_config.json").write_text('{"eos_token_id": [1,')
    with pytest.raises(UserError, match=r"generation_config\.json: is not JSON"):
        stop_ids(here, load_tokenizer(here))


# Endings of the templates of Llama-3, Phi-3, Gemma, Llama-2 and Mistral, ChatML, Vicuna, GLM-4, and one that refuses.
@pytest.mark.parametrize(
    "template, expected",
    [
        (HEADERS, "<|eot_id|>"),
        ("{% for m in messages %}{{ m.content + '<|end|>\n' }}{% endfor %}{{ '<|end_of_text|>' }}", "<|end|>"),
        ("{% for m in messages %}{{ m.content | trim + '<|end_of_turn|>\n' }}{% endfor %}", "<|end_of_turn|>"),
        ("{% for m in messages %}{{ '[INST] ' + m.content + ' </s>' }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "<|end_of_text|>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "<|end_of_text|>"),
        ("{% for m in messages %}{{ m.role + '\n' + m.content }}{% endfor %}", "<|end_of_text|>"),
        ("{{ raise_exception('needs a system message') }}", None),
        ("{% for m in messages %}{{ m.content[0]['text'] + 1 }}{% endfor %}", None),
        (None, None),
    ],
)
def test_the_end_of_turn_is_the_templates(parent, template, expected):
    """Correctness 14: no token is assumed, the template shows it."""
    tokenizer = load_tokenizer(parent)
    tokenizer.chat_template = template
    assert ends_of_turn(tokenizer) == ([] if expected is None else [tokenizer.convert_tokens_to_ids(expected)])


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_the_end_of_turn_is_what_is_trained(tmp_path, sentencepiece):
    from pipeline.data.chat.template import Chat

    tokenizer = tuned.tokenizer(tmp_path, sentencepiece)
    assert ends_of_turn(tokenizer) == [Chat(tokenizer).end_id] == Chat(tokenizer).end_ids


def test_export_keeps_the_settings(parent, tmp_path):
    """Correctness 14: with settings that transformers warns of, and that it keeps only as they are."""
    end, turn = ids(parent, "<|end_of_text|>", "<|eot_id|>")
    here = shutil.copytree(parent, tmp_path / "parent")
    settings = {"eos_token_id": [end, turn], "temperature": 0.9, "top_p": 0.6, "bos_token_id": 3}
    (here / "generation_config.json").write_text(json.dumps(settings))
    recipe = "name: out\nstages:\n  export: {inputs: {model: ./parent}, compare_tokens: 64}\n"
    (tmp_path / "out.yaml").write_text(recipe)
    succeed("export", "out.yaml", cwd=tmp_path)
    found = json.loads((tmp_path / "runs/out/export/current/generation_config.json").read_text())
    assert settings.items() <= found.items()
