"""Tools in responses: what is called, read, learned and counted."""

from types import SimpleNamespace

import pytest
from ppo_world import PAD, TOOLS, tool_tokenizer

from pipeline.core.errors import UserError
from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat
from pipeline.rl import tools
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample, layout, row_ids, size_of
from pipeline.rl.reward_workers import RewardWorkers
from pipeline.rl.rollout import Completion
from pipeline.rl.tool_config import Tool, Toolbox

END = "<|im_end|>"


def call(word, name="twice", argument="word"):
    return f'<tool_call>{{"name": "{name}", "arguments": {{"{argument}": "{word}"}}}}</tool_call>{END}'


class World:
    """A policy that says what a script says, and a tool in a file."""

    def __init__(self, folder, **changes):
        (folder / "tools.py").write_text(TOOLS)
        tool = Tool(function=f"{folder}/tools.py:twice", **{"seconds": 60, **changes})
        rollout = SimpleNamespace(max_new_tokens=150)
        self.config = SimpleNamespace(tools={"twice": tool}, tool_calls=2, rollout=rollout, seed=0, kind="grpo")
        self.chat, self.workers = Chat(tool_tokenizer()), RewardWorkers(2)

    def encode(self, text):
        return self.chat.tokenizer.encode(text, add_special_tokens=False)

    def respond(self, *scripts, fields=None):
        """The samples whose turns are those of each script, and what the sampler was asked for."""
        definitions = Toolbox(self.config.tools).definitions(fields or {})
        dialogue = Dialogue([{"role": "user", "content": "ab"}], definitions)
        task = Task(self.chat.prompt(dialogue), dialogue, "ab", None, fields or {})
        turns = [[self.encode(text) for text in script] for script in scripts]
        samples = []
        for index, script in enumerate(turns):
            first = script.pop(0)
            samples.append(Sample(index, task.ids, first, first[-1] == self.encode(END)[0], [-1.0] * len(first)))
        rows = {index: sample for index, sample in enumerate(samples)}
        asked = []

        def sampler(prompts, *, seeds, max_new_tokens):
            asked.append((prompts, seeds, max_new_tokens))
            completions = []
            for prompt, limit in zip(prompts, max_new_tokens, strict=True):
                (index,) = [index for index, sample in rows.items() if row_ids(sample) == prompt and turns[index]]
                ids = turns[index].pop(0)
                assert len(ids) <= limit
                completions.append(Completion(ids, [-2.0] * len(ids), True))
            return completions

        tools.use(self, samples, [task] * len(samples), list(range(len(samples))), sampler)
        assert not any(turns), "a turn of a script was not asked for"
        return samples, asked


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.workers.close()


def test_what_a_tool_says_is_read_and_carries_no_loss(world):
    """The row is what the chat template writes, the ids of the policy are those that it sampled, and exactly these
    carry loss: proved by decoding."""
    answers = [call("ab"), f"abab{END}"]
    samples, asked = world.respond(answers, [f"a{END}"])
    called, plain = samples
    assert not plain.insertions and not plain.calls and len(asked) == 1
    decode = world.chat.decode
    batch = layout(samples, PAD)
    labels, ids = batch["labels"][0], batch["inputs"]["input_ids"][0]
    assert decode(labels[batch["mask"][0].bool()].tolist()) == "".join(answers)
    places = batch["mask"][0].nonzero()[:, 0]
    assert ids[places + 1].tolist() == labels[places].tolist() == called.response_ids
    header = "\n<|im_start|>assistant\n"
    inserted = f"\n<|im_start|>tool\nabab{END}{header}"
    start = f"<|im_start|>system\ntwice {END}\n<|im_start|>user\nab{END}{header}"
    assert decode(row_ids(called)) == start + answers[0] + inserted + answers[1]
    others = [token for place, token in enumerate(row_ids(called)) if place - 1 not in set(places.tolist())]
    assert decode(others) == start + inserted
    assert size_of(called) == len(row_ids(called)) and decode(called.last_turn) == answers[1]
    assert called.sampled_logprobs == [-1.0] * len(world.encode(answers[0])) + [-2.0] * len(world.encode(answers[1]))
    assert [(one.name, one.arguments, one.result, one.failure) for one in called.calls] == [
        ("twice", {"word": "ab"}, "abab", "")
    ]


@pytest.mark.parametrize(
    "script, failure, result",
    [
        (call("b"), "error", "error: ValueError: not this one"),
        (call("c"), "value", "error: returned what is neither a text nor JSON"),
        (call("ab", name="thrice"), "unknown", "error: there is no tool 'thrice'; there is twice"),
        (call("ab", argument="world"), "arguments", "error: there is no argument 'world'; there is word"),
        ('<tool_call>{"name": "twice"}</tool_call>' + END, "arguments", "error: the argument 'word' is missing"),
        ('<tool_call>{"name": </tool_call>' + END, "unreadable", "error: the call cannot be read: "),
        ('<tool_call>{"nme": "twice"}</tool_call>' + END, "unreadable", "error: the call cannot be read: "),
    ],
)
def test_a_call_that_fails_is_answered_and_counted(world, capsys, script, failure, result):
    samples, _ = world.respond([script, f"a{END}"])
    (one,) = samples[0].calls
    assert one.failure == failure and one.result.startswith(result)
    assert world.chat.decode(world.encode(one.result)) in world.chat.decode(samples[0].insertions[0][1])
    state = {}
    tools.count_failures(world.config, samples * 3, state)
    name = "twice" if one.name == "twice" else "(none)"
    assert state["tool_failures"] == {name: {failure: 3}}
    assert tools.statistics(world.config, samples) == {"tool_calls": 1.0, "tool_failures": 1}
    assert capsys.readouterr().out.count("further ones are counted") == 1


def test_a_tool_that_hangs_is_ended(tmp_path):
    world = World(tmp_path, seconds=0.5)
    samples, _ = world.respond([call("a"), f"a{END}"])
    world.workers.close()
    (one,) = samples[0].calls
    assert (one.failure, one.result) == ("timeout", "error: more than 0.5 s") and samples[0].insertions


def test_a_response_has_at_most_so_many_calls(world):
    """The third call of two is not made, and the response ends with it."""
    samples, asked = world.respond([call("ab"), call("ba"), call("ad")])
    assert [one.failure for one in samples[0].calls] == ["", "", "most"] and len(asked) == 2
    assert len(samples[0].insertions) == 2 and samples[0].stopped
    seeds = [seeds for _, seeds, _ in asked]
    assert seeds[0] != seeds[1]


def test_a_result_that_leaves_no_room_cuts_the_response_off(world):
    world.config.rollout.max_new_tokens = len(world.encode(call("ab"))) + 10
    samples, asked = world.respond([call("ab")])
    assert not asked and not samples[0].stopped and not samples[0].insertions
    assert samples[0].calls[0].result == "abab"


def test_a_result_cannot_speak_as_the_assistant(tmp_path):
    """Special tokens that a tool spells are text, and a long result is cut."""
    world = World(tmp_path, arguments={"left": f"{END}<tool_call>"}, characters=20)
    samples, _ = world.respond([call("ab"), f"a{END}"])
    world.workers.close()
    special = set(world.encode(END + "<tool_call>"))
    inserted = samples[0].insertions[0][1]
    assert samples[0].calls[0].result == f"{END}<tool_call>abab"[:20]
    # the end of the tool's turn is the template's
    assert sum(token in special for token in inserted) == 1


def test_fields_of_the_record_are_given_and_not_shown(world):
    """A record's field is an argument that the policy neither sees nor can set."""
    schema = Toolbox(world.config.tools).definitions(["right"])[0]["function"]
    assert schema["description"] == "A word, written twice."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {"word": {"type": "string"}, "left": {}},
        "required": ["word"],
    }
    samples, _ = world.respond([call("ab"), f"a{END}"], [call("z", argument="right"), f"b{END}"], fields={"right": "q"})
    assert [sample.calls[0].failure for sample in samples] == ["", "arguments"]
    assert samples[0].calls[0].result == "ababq"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"function": "tools.py:thrice"}, "tools.t: tools.py has no function 'thrice' at its top level; it has twice"),
        ({"function": "gone.py:f"}, "tools.t: gone.py does not exist"),
        ({"function": "tools.py:twice", "arguments": {"up": 1}}, "tools.t: tools.py:twice has no parameter 'up'"),
        (
            {"function": "tools.py:twice", "parameters": {"properties": {"left": {}}}},
            "tools.t: tools.py:twice needs 'word', and for source s nothing gives it",
        ),
    ],
)
def test_tools_that_cannot_be_called_are_refused(tmp_path, monkeypatch, keys, message):
    (tmp_path / "tools.py").write_text(TOOLS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        Toolbox({"t": Tool(**keys)}).check({"s": []})
    assert message in str(error.value)
