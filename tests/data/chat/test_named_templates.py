"""Chat templates by name: their texts against the makers' own, the tokens that they add, and a base model that learns
to answer with one."""

import json
from dataclasses import replace

import published_templates as published
import pytest
import torch
import tuned
from harness import stage, succeed
from test_template_matrix import CASES, hugging_face

from pipeline.core.errors import UserError
from pipeline.data.chat import named_templates
from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.data.tokenizer.tokenizer_folder import CHAT_TEMPLATE

# Templates of the same name as their makers publish them; of gemma without a system message, which it refuses.
MAKERS = {"llama3": "llama3", "qwen3": "qwen3", "gemma": "gemma", "phi3": "phi3"}


@pytest.mark.parametrize("name", MAKERS)
def test_texts_equal_the_makers(name):
    tokenizer = published.tokenizer(MAKERS[name])
    source = named_templates.source_of(name)
    compared = 0
    for case, dialogue in CASES.items():
        if (case == "tool" and name != "qwen3") or (case, name) == ("system", "gemma"):
            continue
        for number in range(1, len(dialogue.messages) + 1):
            for prompt in (False, True):
                messages = hugging_face(dialogue.until(number))
                options = {"tools": dialogue.tools, "tokenize": False, "add_generation_prompt": prompt}
                theirs = tokenizer.apply_chat_template(messages, **options)
                ours = tokenizer.apply_chat_template(messages, chat_template=source, **options)
                if name == "phi3":  # it ends a text that waits for nobody with one more token
                    theirs = theirs.removesuffix("<|endoftext|>")
                assert ours == theirs, (case, number, prompt)
                compared += 1
    assert compared > 20


def test_chatml_is_what_the_tokenizer_stage_writes():
    assert named_templates.source_of("chatml") == CHAT_TEMPLATE


@pytest.mark.parametrize("name", named_templates.names())
def test_every_named_template_can_be_trained_with(name, tmp_path):
    """With a tokenizer that has none of its tokens; and again after it was written and read."""
    tokenizer, added = named_templates.with_template(published.tokenizer("smolvlm"), name, {})
    marks = {"gemma": 2, "llama3": 3, "phi3": 4}.get(name, 0)  # the tokenizer has chatml's
    assert len(added) == marks
    for index, pieces in added.items():
        assert len(pieces) > 1 and tokenizer.decode(pieces) == tokenizer.convert_ids_to_tokens(index)
    chat = Chat(tokenizer)
    cases = [replace(CASES[case], tools=None) for case in ("single", "system", "multi")]
    rows = chat.rows(cases)
    assert not any(isinstance(row, str) for row in rows), rows
    tokenizer.save_pretrained(tmp_path / "parent")
    named_templates.save_tokenizer(tokenizer, tmp_path / "parent", tmp_path / "new", bool(added))
    again = Chat(load_tokenizer(tmp_path / "new"))
    assert again.rows(cases) == rows and again.end_ids == chat.end_ids


def test_names_paths_and_mistakes(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(named_templates.source_of("llama3"))
    assert named_templates.source_of(str(path)) == named_templates.source_of("llama3")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/chat_template.jinja").write_text("{{ 1 }}")
    assert named_templates.source_of(str(tmp_path / "folder")) == "{{ 1 }}"
    with pytest.raises(UserError, match="no template is called 'chatlm': did you mean 'chatml'"):
        named_templates.source_of("chatlm")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        named_templates.source_of(str(path))


def test_variables_are_defaults_of_the_published_template():
    tokenizer = published.tokenizer("qwen3")
    source = tokenizer.chat_template
    named_templates.with_template(tokenizer, None, {"enable_thinking": False})
    messages = [{"role": "user", "content": "q"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    plain = tokenizer.apply_chat_template(messages, chat_template=source, **options)
    empty_thought = "<think>\n\n</think>\n\n"
    assert tokenizer.apply_chat_template(messages, **options) == plain + empty_thought
    assert tokenizer.apply_chat_template(messages, enable_thinking=True, **options) == plain
    (row,) = Chat(tokenizer).rows([[*messages, {"role": "assistant", "content": "a"}]])[0]
    assert tokenizer.decode(row.ids[row.start :]) == "a<|im_end|>"
    with pytest.raises(UserError, match="chat_template_kwargs: the chat template does not know 'thinking'; it reads"):
        named_templates.with_template(tokenizer, None, {"thinking": True})


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """SFT of a base model whose tokenizer has no chat template, with llama3's."""
    folder = tuned.world(tmp_path_factory.mktemp("named"))
    (folder / "base/model/chat_template.jinja").unlink()
    code, text = stage("sft", "tiny.yaml", cwd=folder)
    assert code == 2 and "has no chat template; give the stage one by name (chat_template: chatml)" in text, text
    text = succeed("sft", "tiny.yaml", "sft.chat_template=llama3", cwd=folder)
    return folder, text


def test_a_base_model_learns_with_a_named_template(learned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = learned
    assert "<|start_header_id|>, <|end_header_id|>, <|eot_id|> are added to the tokenizer and to the model" in text
    found = tuned.metrics(folder, "sft")
    assert found["heldout_eos_rate_after"] > 0.9 and found["heldout_rule_after"] > 0.8
    published_folder = folder / "runs/tiny/sft/current/model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(published_folder),
        AutoTokenizer.from_pretrained(published_folder),
    )
    assert model.config.vocab_size == len(tokenizer) == 383
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in model.generation_config.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a old red cat?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "animal<|eot_id|>"


def test_new_rows_are_the_mean_of_the_old_pieces(tmp_path):
    from pipeline.models import build, vocabulary

    model = build.load(tuned.base(tmp_path) / "model")
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    vocabulary.add_rows(model, {380: [7, 9, 11], 381: [7]})
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[:380], before) and model.config.vocab_size == 382
    torch.testing.assert_close(after[380], before[[7, 9, 11]].mean(0))
    torch.testing.assert_close(model.get_output_embeddings().weight[381], head[7])


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["sft.lora={rank: 4}"], 0, ""),
        (["sft.lora={rank: 4, publish: adapter}"], 2, "cannot hold the rows of the tokens that chat_template adds"),
        (["sft.chat_template=chatlm"], 2, "no template is called 'chatlm': did you mean 'chatml'"),
        (["sft.chat_template_kwargs={think: true}"], 2, "the chat template does not know 'think'"),
    ],
)
def test_with_adapters_and_mistakes(learned, tmp_path, words, code, message):
    folder, _ = learned
    (tmp_path / "base").symlink_to(folder / "base")
    for name in ("rows.jsonl", "tiny.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    words = ["sft.chat_template=llama3", "sft.steps=2", "sft.max_prompts=0", *words]
    found, text = stage("sft", "tiny.yaml", *words, cwd=tmp_path)
    assert found == code and message in text and "Traceback" not in text, text
    if code == 0:
        model = tmp_path / "runs/tiny/sft/current/model"
        assert json.loads((model / "config.json").read_text())["vocab_size"] == 383


def test_the_content_of_a_template_file_is_part_of_the_identity(learned, tmp_path):
    folder, _ = learned
    (tmp_path / "base").symlink_to(folder / "base")
    for name in ("rows.jsonl", "tiny.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "mine.jinja").write_text(named_templates.source_of("llama3"))
    words = ["sft.chat_template=mine.jinja", "sft.steps=1", "sft.max_prompts=0"]
    succeed("sft", "tiny.yaml", *words, cwd=tmp_path)
    assert "up to date" in succeed("sft", "tiny.yaml", *words, cwd=tmp_path)
    (tmp_path / "mine.jinja").write_text(named_templates.source_of("llama3").replace("\\n\\n", "\\n"))
    assert "up to date" not in succeed("sft", "tiny.yaml", *words, cwd=tmp_path)
