"""Which iterations are written token by token, what of them, and what a resumed run keeps."""

import json

import pytest
import torch
from ppo_world import SPECIAL, tokenizer_of

from pipeline.data.chat.template import Chat
from pipeline.rl.responses import Sample
from pipeline.rl.rollout_log import FILE, MOST_TOKENS, RolloutLog


@pytest.mark.parametrize(
    "steps, written", [(1, [1]), (3, [1, 2, 3]), (8, list(range(1, 9))), (50, [1, 8, 15, 22, 29, 36, 43, 50])]
)
def test_iterations_from_the_first_to_the_last(tmp_path, steps, written):
    assert sorted(RolloutLog(tmp_path, steps, 8).steps) == written


def write(log, step, samples):
    """Every token has reward 0, the last one 1."""
    longest = max(len(sample.response_ids) for sample in samples)
    zeros = torch.zeros(len(samples), longest)
    rewards = zeros.clone()
    for row, sample in enumerate(samples):
        rewards[row, len(sample.response_ids) - 1] = 1
    log.write(
        step, Chat(tokenizer_of()), samples, {"sampled_logprobs": zeros}, {"rewards": rewards, "advantages": zeros}
    )


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def sample(letters):
    ids = tokenizer_of().convert_tokens_to_ids
    return Sample(0, ids(list("hi")), ids(list(letters)), True, [])


def test_rows_have_the_numbers_of_their_own_tokens(tmp_path):
    log = RolloutLog(tmp_path, 3, show=2)
    short = sample("no")
    short.insertions = [(1, tokenizer_of().convert_tokens_to_ids(list("is")))]
    write(log, 1, [sample("yes"), short, sample("more")])
    assert lines(tmp_path) == [
        {"step": 1, "prompt": "hi", "score": 0.0, "stopped": True, "length": 3, "tokens": ["y", "e", "s"]}
        | {"reward": [0, 0, 1], "advantage": [0, 0, 0], "logprob": [0, 0, 0]},
        {"step": 1, "prompt": "hi", "score": 0.0, "stopped": True, "length": 2, "tokens": ["n", "o"]}
        | {"inserted": [[1, "is"]], "reward": [0, 1], "advantage": [0, 0], "logprob": [0, 0]},
    ]


def test_a_long_response_is_cut_and_keeps_its_length(tmp_path):
    write(RolloutLog(tmp_path, 1, show=1), 1, [sample("a" * (MOST_TOKENS + 88))])
    [row] = lines(tmp_path)
    assert len(row["tokens"]) == len(row["reward"]) == MOST_TOKENS and row["length"] == MOST_TOKENS + 88


def test_a_number_that_is_none_is_null(tmp_path):
    log = RolloutLog(tmp_path, 1, show=1)
    numbers = torch.tensor([[float("nan"), float("inf")]])
    log.write(
        1,
        Chat(tokenizer_of()),
        [sample("ab")],
        {"sampled_logprobs": numbers},
        {"rewards": numbers, "advantages": numbers},
    )
    assert lines(tmp_path)[0]["reward"] == [None, None]


def test_what_comes_after_a_checkpoint_is_written_again(tmp_path):
    log = RolloutLog(tmp_path, 3, show=1)
    log.rewind(0)  # a new run has no file
    for step in (1, 2, 3):
        write(log, step, [sample(SPECIAL[0][3:6])])
    with open(tmp_path / FILE, "a") as handle:
        handle.write('{"step": 3, "tok')
    log.rewind(2)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]


def test_nothing_is_written_that_is_not_asked_for(tmp_path):
    write(RolloutLog(tmp_path, 50, show=8), 2, [sample("ab")])
    write(RolloutLog(tmp_path, 50, show=0), 1, [sample("ab")])
    assert not (tmp_path / FILE).exists()
