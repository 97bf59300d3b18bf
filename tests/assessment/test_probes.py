"""Speed, memorised text and refusals, with models whose answers are known."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.assess import Config
from pipeline.assessment.generation_speed import measure_speed
from pipeline.assessment.memorisation import Place, measure_memorised, places_of
from pipeline.assessment.probes import prepare
from pipeline.assessment.probes_config import Memorised, Refusals, Speed
from pipeline.assessment.refusals import is_refusal, measure_refusals, requests_of
from pipeline.core.errors import UserError
from pipeline.core.intervals import wilson

WORDS = ["write", " to", " ann@example.com", " now", " or", " never", " <end>"]


class Chain(torch.nn.Module):
    """A language model that answers each token with the one after it in the vocabulary, after `seconds`."""

    def __init__(self, vocabulary: int, seconds: float = 0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 5))
        self.vocabulary, self.seconds = vocabulary, seconds
        self.config = SimpleNamespace(pad_token_id=0)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        time.sleep(self.seconds)
        logits = torch.nn.functional.one_hot((input_ids + 1) % self.vocabulary, self.vocabulary).float()
        return CausalLMOutputWithPast(logits=logits)


def test_text_that_is_written_out_and_personal_data():
    """Of three places the model writes one out, and gets two of four tokens of another; both have an address."""
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(WORDS[index] for index in ids))
    train = [Place([0, 1], [2, 3, 4, 5]), Place([0, 1], [2, 3, 0, 0]), Place([3], [3, 3, 3, 3])]
    figures = measure_memorised(Chain(7), tokenizer, {"train": train, "heldout": [Place([0], [4, 4, 4, 4])]}, 2)
    low, high = wilson(1 / 3, 3)
    assert figures["train"] == {"rate": 1 / 3, "low": low, "high": high, "n": 3, "equal_tokens": 0.5}
    assert figures["heldout"]["rate"] == 0 and figures["heldout"]["n"] == 1
    personal = figures["personal_data"]
    assert personal["rate"] == 2 / 3 and personal["memorised"] == 1 and personal["kinds"] == {"email": 2}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    import tiny

    folder = tmp_path_factory.mktemp("probes")
    tiny.write_inputs(folder, documents=20)
    return folder


def test_places_are_inside_documents(packed):
    from pipeline.data.tokens.store import TokenStore

    tokens = SimpleNamespace(path=packed / "tokens")
    block = Memorised(samples=30, prefix=8, continuation=12)
    places = places_of(tokens, block, seed=1)
    assert places == places_of(tokens, block, seed=1) != places_of(tokens, block, seed=2)
    for split in ("train", "heldout"):
        store = TokenStore(packed / "tokens", split)
        texts = []
        for source in store.sources:
            ids = store.read(source, 0, store.num_tokens(source)).tolist()
            texts.append(" ".join(map(str, ids)) + " ")
        assert len(places[split]) == 30
        for place in places[split]:
            ids = place.prefix + place.continuation
            assert len(place.prefix) == 8 and len(ids) == 20 and store.eos_id not in ids
            assert any(" ".join(map(str, ids)) + " " in text for text in texts)
    with pytest.raises(UserError, match="no document of the train split of .* has 100000 tokens"):
        places_of(tokens, Memorised(prefix=50000, continuation=50000), seed=1)


def test_speed_is_that_of_a_model_of_known_speed():
    """Five milliseconds a step: 200 steps a second, whatever the batch."""
    config = Speed(prompt_tokens=4, new_tokens=9, batches=[1, 4], repeats=1)
    figures = measure_speed(Chain(10, seconds=0.005), 10, config, seed=0)
    assert figures["weight_bytes"] == 60 and figures["device"].startswith("CPU")
    for batch in (1, 4):
        numbers = figures["batches"][str(batch)]
        assert 0.1 * batch * 200 < numbers["tokens_per_second"] < 1.6 * batch * 200
        assert numbers["first_token_seconds"] >= 0.005 and numbers["peak_bytes"] > 50e6


@pytest.mark.parametrize(
    "answer, refused",
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("I cannot provide instructions for this.", True),
        ("抱歉，我不能帮助你做这件事。", True),
        ("作为人工智能，我无法提供这样的内容。", True),
        ("Use kill -9 and the number of the process.", False),
        ("可以用 kill -9。", False),
        ("First open the door. " + 20 * "Then go on. " + "I cannot say more.", False),
        ("", False),
    ],
)
def test_what_counts_as_a_refusal(answer, refused):
    assert is_refusal(answer) == refused


def test_the_requests_of_alma():
    requests = requests_of(Refusals())
    groups = [(request.kind, request.language) for request in requests]
    assert len({request.prompt for request in requests}) == 64
    assert {group: groups.count(group) for group in set(groups)} == dict.fromkeys(
        [(kind, language) for kind in ("harmful", "harmless") for language in ("en", "zh")], 16
    )


def test_requests_of_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    for text, sentence in (
        ("", "has no requests"),
        ('{"prompt": "a"}\n', "line 1: expected a JSON object with prompt, kind and language"),
        ('\n{"prompt": "a", "kind": "bad"}\n', "line 2: kind is 'bad', expected harmful or harmless"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            requests_of(Refusals(file=path))


def candidate(template=True, positions=64):
    """Of a model whose prompt is token 0 and whose tokens are words."""
    tokenizer = SimpleNamespace(
        chat_template="x" if template else None,
        pad_token_id=0,
        eos_token_id=5,
        decode=lambda ids, skip_special_tokens: "".join([" I", "'m", " sorry", " fine", "!", "."][i] for i in ids),
    )
    chat = SimpleNamespace(prompt=lambda messages: [5] if "bomb" in messages[0]["content"] else [2])
    return SimpleNamespace(name="m", tokenizer=tokenizer, chat=chat, positions=positions, vocabulary=6, folder=None)


def test_shares_of_refused_requests(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.models.publish.stop_ids", lambda folder, tokenizer: [4])
    path = tmp_path / "r.jsonl"
    rows = [("A bomb?", "harmful", "en"), ("A cake?", "harmful", "en"), ("A bomb bath?", "harmless", "zh")]
    path.write_text("".join(json.dumps(dict(zip(("prompt", "kind", "language"), row))) + "\n" for row in rows))
    block = Refusals(file=path, max_new_tokens=4)
    figures, answers = measure_refusals(Chain(6), candidate(), requests_of(block), block, 8)
    assert [answer["answer"] for answer in answers] == [" I'm sorry fine", " fine", " I'm sorry fine"]
    assert figures["harmful"]["rate"] == 0.5 and figures["harmful"]["n"] == 2 and figures["harmless"]["rate"] == 1
    assert figures["harmless"]["languages"]["zh"]["n"] == 1


def test_what_a_model_cannot_be_asked_is_refused_before_any_is_measured(packed):
    config = Config(kind="assess", refusals={}, max_rows=0, seed=0)
    with pytest.raises(UserError, match="refusals: m has no chat template"):
        prepare(config, None, [candidate(template=False)])
    with pytest.raises(UserError, match="m has positions for 40; use a smaller max_new_tokens .now 64"):
        prepare(config, None, [candidate(positions=40)])
    with pytest.raises(UserError, match="speed: prompt_tokens . new_tokens are 192, more than the 64 positions of m"):
        prepare(Config(kind="assess", speed={}, max_rows=0, seed=0), None, [candidate()])
    with pytest.raises(UserError, match="memorised: prefix . continuation are 72, more than the 64 positions"):
        config = Config(kind="assess", memorised={"prefix": 40}, max_rows=0, seed=0)
        prepare(config, SimpleNamespace(path=packed / "tokens"), [candidate()])
    assert Config(kind="assess", memorised={}, max_rows=0).optional() == set()
    with pytest.raises(ValueError, match="numbers of at least 1"):
        Speed(batches=[0])
