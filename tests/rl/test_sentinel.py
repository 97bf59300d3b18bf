"""Alarms of online RL: each fault is injected, alone and through a stage."""

import json
import math

import pytest
from harness import files_of, stage
from ppo_world import write_world
from test_grpo import iterations, run
from test_ppo import logged

from pipeline import grpo, ppo
from pipeline.rl import sentinel
from pipeline.rl.sentinel import HEALTHY, WINDOW, judge

COMMON = {
    "sources": {"words": {"path": "words.jsonl", "answer": "{word}"}},
    "steps": 100,
    "batch_size": 4,
    "sequence_length": 48,
    "rollout": {"max_new_tokens": 6},
    "rule": "exact",
}


def group_config(**alarms):
    rewards = {"own": {"function": "own.py:f"}, "held": {"function": "own.py:g", "weight": 0}}
    return grpo.Config(**COMMON, samples=5, update={"kl_coef": 0.1}, rewards=rewards, alarms=alarms)


def healthy(number=0) -> dict:
    """What a healthy iteration logs."""
    return {
        "kl": 3.0 + 0.1 * (number % 3),
        "length_mean": 20.0,
        "repetition": 0.05,
        "entropy": 2.0,
        "eos_rate": 0.95,
        "reward": 0.5 + 0.001 * number,
        "rule": 0.4,
        "reward/held": 0.4,
        "clip_fraction": 0.1,
        "equal_groups": 0.2,
        "reward_failures/own": 0,
        "reward_failures/held": 0,
        "reward_calls": 20,
    }


def after(config, faults: list[dict], state=None):
    """(state, verdicts, numbers) after twice WINDOW healthy iterations and the faulty ones."""
    state = {"step": 0, "kl_coef": 0.1} if state is None else state
    verdicts, lines = [], []
    for number, fault in enumerate([*[{}] * (2 * WINDOW), *faults]):
        state["step"] += 1
        stats = healthy(number) | fault
        verdicts.append(judge(config, state, stats))
        lines.append(stats)
    return state, verdicts[2 * WINDOW :], lines[2 * WINDOW :]


FAULTS = {  # numbers of a faulty iteration, and one that is just healthy
    "kl": ({"kl": 12.5}, {"kl": 7.0}),
    "length": ({"length_mean": 41.0}, {"length_mean": 39.0}),
    "repetition": ({"repetition": 0.31}, {"repetition": 0.29}),
    "entropy": ({"entropy": 0.19}, {"entropy": 0.21}),
    "eos_rate": ({"eos_rate": 0.79}, {"eos_rate": 0.81}),
    "clip_fraction": ({"clip_fraction": 0.31}, {"clip_fraction": 0.29}),
    "equal_groups": ({"equal_groups": 0.81}, {"equal_groups": 0.79}),
    "reward_failures": ({"reward_failures/held": 2}, {"reward_failures/own": 1}),  # of 20 calls
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_raises_its_alarm_and_no_other(name, capsys):
    """A warning is printed once until the number is healthy again; one iteration alone raises nothing."""
    faulty, well = FAULTS[name]
    config = group_config(kl_growth={"action": "off"}) if name == "kl" else group_config()
    state, verdicts, lines = after(config, [well, faulty, well, faulty, faulty, faulty, well, faulty, faulty])
    assert state["alarms"]["raised"] == {name: 2} and verdicts == [None] * 9
    raised = [[key for key in line if key.startswith("alarm/")] for line in lines]
    assert raised == [[]] * 4 + [[f"alarm/{name}"]] + [[]] * 3 + [[f"alarm/{name}"]]
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"alarm {name}: {HEALTHY[name].noun}") == 2


def test_a_kl_that_grows_fast_is_seen_before_it_is_large():
    """From 3 nats to 8 within two iterations; slowly it may get there."""
    assert after(group_config(), [{"kl": 7.5}, {"kl": 8.0}])[0]["alarms"]["raised"] == {"kl_growth": 1}
    slow = [{"kl": 3 + 0.3 * number} for number in range(17)]
    assert after(group_config(), slow)[0]["alarms"]["raised"] == {}


def test_a_short_length_and_a_number_that_is_none_are_faults_too():
    assert after(group_config(), [{"length_mean": 9.0}] * 2)[0]["alarms"]["raised"] == {"length": 1}
    state, _, _ = after(group_config(), [{"kl": math.nan}] * 2)
    assert state["alarms"]["raised"] == {"kl": 1, "kl_growth": 1}
    json.loads(json.dumps(state, allow_nan=False))  # it goes into checkpoints


@pytest.mark.parametrize("rule", ["rule", "reward/held"])
def test_a_reward_that_rises_while_the_rule_falls(rule):
    """The proxy is exploited. A rule that falls together with the reward is no gap."""
    exploited = [{"reward": 0.9, rule: 0.25}] * (WINDOW + 1)
    assert "proxy_gap" in after(group_config(), exploited)[0]["alarms"]["raised"]
    worse = [{"reward": 0.1, rule: 0.25}] * (WINDOW + 1)
    assert "proxy_gap" not in after(group_config(), worse)[0]["alarms"]["raised"]


def test_actions():
    """raise_beta and lower_rate are repeated; stop comes before rollback."""
    alarms = {
        "repetition": {"action": "raise_beta", "factor": 2},
        "eos_rate": {"action": "lower_rate", "factor": 4, "in_a_row": 1},
        "kl": {"action": "rollback", "in_a_row": 1, "above": 5},
        "entropy": {"action": "stop", "in_a_row": 1},
        "clip_fraction": {"action": "off"},
    }
    faults = [{"repetition": 0.5, "eos_rate": 0.1, "clip_fraction": 1.0}] * 4
    state, verdicts, _ = after(group_config(**alarms), faults)
    assert state["kl_coef"] == pytest.approx(0.1 * 2**2) and state["lr_scale"] == pytest.approx(4.0**-4)
    assert state["alarms"]["raised"] == {"repetition": 2, "eos_rate": 4} and verdicts == [None] * 4
    _, verdicts, _ = after(group_config(**alarms), [{"kl": 6.0}, {"kl": 6.0, "entropy": 0.0}])
    assert verdicts[0][0] == "rollback" and "6 is above 5" in verdicts[0][1] and verdicts[1][0] == "stop"


def test_beta_and_rate_are_changed_ten_times_and_no_more(capsys):
    """Then the alarm warns: once, until the number has been inside its range again. The rate has its own count."""
    alarms = {
        "repetition": {"action": "raise_beta", "factor": 2, "in_a_row": 1},
        "eos_rate": {"action": "lower_rate", "factor": 2, "in_a_row": 2},
    }
    fault = {"repetition": 0.5, "eos_rate": 0.1}
    state, _, lines = after(group_config(**alarms), [fault] * 15 + [{}] + [fault] * 3)
    assert state["kl_coef"] == pytest.approx(0.1 * 2**10) and state["lr_scale"] == pytest.approx(2.0**-8)
    assert [number for number, line in enumerate(lines) if "alarm/repetition" in line] == [*range(10), 16]
    said = capsys.readouterr()
    assert (said.out + said.err).count("that was the last of 10 changes, this alarm only warns from now on") == 1


def test_a_gap_is_measured_where_both_windows_are_full():
    """A reward or a rule that is not a number is not remembered: no error, and no mean of too few values."""
    for key in ("reward", "rule", "reward/held"):
        nothing = [{key: math.nan}] * (2 * WINDOW)
        state, _, _ = after(group_config(), [], state={"step": 0, "kl_coef": 0.1, **memory_of(nothing)})
        assert "proxy_gap" not in state["alarms"]["raised"]
    broken = [{"reward/held": math.nan, "reward": 0.4}] * WINDOW + [{"reward/held": math.nan}] * WINDOW
    falls = [{"reward/held": math.nan, "reward": 0.9, "rule": 0.1}] * (WINDOW + 1)
    assert "proxy_gap" in memory_of([*broken, *falls])["alarms"]["raised"], "the other rule counts"


def memory_of(faults: list[dict]) -> dict:
    """The alarms' memory after these iterations and no others."""
    state = {"step": 0, "kl_coef": 0.1}
    for number, fault in enumerate(faults):
        judge(group_config(), state, healthy(number) | fault)
    return {"alarms": state["alarms"]}


def test_what_it_remembers_is_in_the_state():
    """A run that is interrupted after any iteration raises the same alarms."""
    config = group_config(length={"action": "raise_beta"})
    exploited = {"length_mean": 50.0, "reward": 0.9, "rule": 0.1}
    faults = [exploited] * 10 + [exploited | {"eos_rate": 0.1}] * 2
    whole, _, lines = after(config, faults)
    state = {"step": 0, "kl_coef": 0.1}
    for number, fault in enumerate([*[{}] * (2 * WINDOW), *faults]):
        state = json.loads(json.dumps(state, sort_keys=True))  # as in a checkpoint
        state["step"] += 1
        stats = healthy(number) | fault
        judge(config, state, stats)
        if number >= 2 * WINDOW:
            assert stats == lines[number - 2 * WINDOW]
    assert state == whole and sentinel.summary_of(state) == sentinel.summary_of(whole)


@pytest.mark.parametrize(
    "kind, keys, message",
    [
        ("grpo", {"alarms": {"kl": {}}}, "alarms.kl needs the KL, which is not measured with kl_coef: 0"),
        ("grpo", {"alarms": {"proxy_gap": {}}, "rule": None}, "alarms.proxy_gap needs a rule that is not trained on"),
        ("ppo", {"alarms": {"proxy_gap": {}}, "ppo": {"rule_coef": 1}}, "needs a rule that is not trained on"),
        ("ppo", {"alarms": {"equal_groups": {}}}, "alarms.equal_groups is about the responses to one prompt"),
        ("ppo", {"alarms": {"reward_failures": {}}}, "alarms.reward_failures counts calls of reward functions"),
        ("grpo", {"alarms": {"length": {"action": "raise_beta"}}}, "raise_beta multiplies kl_coef, which is 0"),
        ("ppo", {"alarms": {"kl": {"action": "raise_beta"}}, "ppo": {"kl_target": 6}}, "kl_target adapts already"),
        ("ppo", {"alarms": {"kl": {"action": "off", "above": 3}}}, "above: 3.0 says when an alarm is raised"),
        ("ppo", {"alarms": {"kl": {"factor": 3}}}, "factor: 3.0 is for raise_beta and lower_rate"),
        ("ppo", {"alarms": {"length": {"above": 1, "below": 2}}}, "above: 1 is not more than below: 2"),
        ("ppo", {"alarms": {"klx": {}}}, "'kl', 'kl_growth'"),
    ],
)
def test_what_could_do_nothing_is_refused(kind, keys, message):
    with pytest.raises(ValueError) as error:
        {"grpo": grpo, "ppo": ppo}[kind].Config(**COMMON | keys)
    assert message in str(error.value)


def test_alarms_without_what_they_need_are_silent():
    config = grpo.Config(**COMMON | {"rule": None}, samples=5)
    assert {name for name in HEALTHY if sentinel.obstacle(config, name)} == {
        "kl",
        "kl_growth",
        "proxy_gap",
        "reward_failures",
    }


# ---- through a stage -------------------------------------------------------------------------------------------------

FLAKY = """
def letters(response, prompt):
    if sum(map(ord, prompt[-1]["content"])) % 2:
        raise ValueError("not this one")
    return response.count("z") / max(1, len(response))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("sentinel"))
    (folder / "flaky.py").write_text(FLAKY)
    return folder


def test_a_reward_that_fails_on_half_of_the_prompts_stops_the_run(world):
    words = ["grpo.inputs={policy: ./policy}", "grpo.rewards={share: {function: 'flaky.py:letters'}}"]
    alarms = "grpo.alarms={reward_failures: {action: stop, above: 0.1, in_a_row: 1}, eos_rate: {action: off}}"
    code, text = stage("grpo", "group.yaml", *words, alarms, "output=flaky", cwd=world)
    assert code == 2 and "Traceback" not in text, text
    assert "step 1: alarm reward_failures: share of calls of a reward that fail: 0." in text and "--fork" in text


@pytest.mark.slow
def test_a_fork_follows_its_own_recipe(world):
    """kl_coef, learning rate and rewards of the run that it continues were changed, by alarms and in the recipe."""
    words = ["grpo.steps=6", "grpo.update={kl_coef: 0.1, epochs: 2, minibatches: 2}", "output=forked"]
    alarm = "grpo.alarms={eos_rate: {action: ACTION, below: 1.0, in_a_row: 1, factor: 2}}"
    raised = [*words, alarm.replace("ACTION", "raise_beta")]
    code, text = stage("grpo", "group.yaml", *raised, cwd=world, fault="work:4")
    assert code == -9 and "kl_coef is now 0.4" in text, text
    rewards = "grpo.rewards={model: {function: model}, short: {function: length, weight: -1, arguments: {at_most: 3, unit: characters}}}"
    changes = [
        "grpo.update={kl_coef: 0.07, epochs: 2, minibatches: 2}",
        rewards,
        "grpo.alarms={eos_rate: {action: off}}",
    ]
    found, metrics, text = run(world, *words, *changes, "--fork", output="forked")
    lines = iterations(found)
    assert lines[0]["step"] > 1 and lines[-1]["step"] == 6
    assert {line["kl_coef"] for line in lines} == {0.07} and metrics["alarms"] == {}
    assert lines[0]["lr"] == pytest.approx(3e-3 * (1 - (lines[0]["step"] - 1) / 6))
    before = [line for line in logged(found) if "heldout_reward" in line][0]
    assert before["step"] == lines[0]["step"] - 1 and before["heldout_reward"] == metrics["reward_before"]


def test_alarms_are_found_in_the_results_of_a_run_that_was_rolled_back(world):
    """Raised in the second iteration: counted, and named in the first line after the rollback, though lines are
    written every tenth iteration only. With a checkpoint of each, the count of iterations begins again."""
    words = ["grpo.steps=4", "grpo.log.every_steps=10", "grpo.spikes.rollbacks=1", "grpo.save.every_steps=1"]
    alarm = "grpo.alarms={eos_rate: {action: rollback, below: 1.1, in_a_row: 2}}"
    code, text = stage("grpo", "group.yaml", *words, alarm, "output=noted", cwd=world)
    assert code == 2 and "step 2: alarm eos_rate" in text and "back to step 1" in text, text
    assert "step 3: alarm eos_rate" in text and "and 1 rollbacks were made" in text, text
    (partial,) = (world / "noted/t/grpo").glob("*.partial")
    lines = {line["step"]: line for line in logged(partial) if "policy_loss" in line}
    assert list(lines) == [1, 2, 3] and set(lines[2]["rollback_alarms"]) == {"eos_rate"}
    assert "alarm/eos_rate" in lines[3] and "alarm/eos_rate" not in lines[2]
    state = json.loads((partial / "checkpoints/step-000002/complete.json").read_text())["state"]
    assert state["alarms"]["raised"] == {"eos_rate": 1} and state["alarms"]["outside"]["eos_rate"] == 1


def test_a_line_with_an_alarm_is_always_written(world):
    alarm = "grpo.alarms={eos_rate: {below: 1.1, in_a_row: 2}}"
    found, metrics, _ = run(world, "grpo.steps=4", "grpo.log.every_steps=10", alarm, output="due")
    assert [line["step"] for line in iterations(found)] == [1, 2, 4] and "alarm/eos_rate" in iterations(found)[1]
    assert metrics["alarms"]["eos_rate"] == 1


PARTLY = """
def letters(response, prompt):
    if sum(map(ord, prompt[-1]["content"])) % 2:
        raise ValueError("not this one")
    return len(response) + sum(map(ord, response)) / 1e4
"""


@pytest.mark.slow
def test_failed_calls_of_prompts_that_are_replaced_count(world):
    """All answers to a prompt fail or none: groups of failures are equal and are drawn again."""
    (world / "partly.py").write_text(PARTLY)
    words = ["grpo.inputs={policy: ./policy}", "grpo.rewards={share: {function: 'partly.py:letters'}}", "grpo.steps=2"]
    found, metrics, _ = run(world, *words, "grpo.resample=6", output="partly")
    lines = iterations(found)
    assert all(line["equal_groups"] == 0 for line in lines)
    for line in lines:  # a group has 4 answers, 4 groups remain
        assert line["reward_calls"] == 16 + line["reward_failures/share"]
    failed = sum(line["reward_failures/share"] for line in lines)
    assert failed > 0 and metrics["reward_failures"]["share"] == {"error": failed}
    assert metrics["alarms"]["reward_failures"] == 1


RISES = ("grpo.optimizer.lr=3e-2", "grpo.update={kl_coef: 0.01, epochs: 2, minibatches: 2}", "grpo.steps=8")


@pytest.mark.slow
def test_a_policy_that_runs_away_is_rolled_back_and_then_stopped(world):
    """Back to the first checkpoint with other prompts, as often as spikes.rollbacks says, whatever is killed."""
    words = [*RISES, "grpo.alarms={kl: {action: rollback, above: 0.5, in_a_row: 1}}", "grpo.save.every_steps=100"]
    code, text = stage("grpo", "group.yaml", *words, "output=rolled", cwd=world)
    assert code == 2 and "and 3 rollbacks were made" in text and text.count("back to step 0") == 3, text
    code, again = stage("grpo", "group.yaml", *words, "output=rolled-killed", cwd=world, fault="rollback:2")
    assert code == -9, again
    code, again = stage("grpo", "group.yaml", *words, "output=rolled-killed", cwd=world)
    assert code == 2 and again.splitlines()[-1] == text.splitlines()[-1].replace("rolled/", "rolled-killed/"), again


@pytest.mark.slow
def test_beta_and_rate_change_and_a_killed_run_ends_with_the_same_bytes(world):
    alarms = (
        "grpo.alarms={kl: {action: raise_beta, above: 0.1, factor: 3, in_a_row: 1}, eos_rate: {action: lower_rate,"
        " below: 1.0, in_a_row: 2, factor: 2}}"
    )
    words = [*RISES, alarms]
    whole, metrics, text = run(world, *words, output="whole")
    lines = iterations(whole)
    assert metrics["alarms"]["kl"] > 1 and metrics["alarms"]["eos_rate"] == 4 and "; kl_coef is now 0.03" in text
    for before, line in zip(lines, lines[1:], strict=False):
        assert line["kl_coef"] == pytest.approx(before["kl_coef"] * (3 if "alarm/kl" in before else 1))
        assert ("alarm/eos_rate" in line) == (line["step"] % 2 == 0)
    scheduled = [line["lr"] * 2 ** ((line["step"] - 1) // 2) for line in lines]
    assert scheduled == pytest.approx([3e-2 * (1 - step / 8) for step in range(8)])
    assert "alarms: " in metrics["summary"]["measure"]
    for fault in ("work:2", "save:3", "publish:1"):
        code, text = stage("grpo", "group.yaml", "output=killed", *words, cwd=world, fault=fault)
        assert code == -9, text
    found, again, _ = run(world, *words, output="killed")
    assert files_of(found) == files_of(whole) and again == metrics
