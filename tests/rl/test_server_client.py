"""Rollouts from a server: the same responses, weights that are proved equal, and an end for everything that can go
wrong. The server is that of tests/helpers/fake_vllm.py, but for the last tests, which need a real one."""

import json
import os
import time
from pathlib import Path

import fake_vllm
import numpy as np
import pytest
import torch
from harness import stage
from ppo_world import SPECIAL, samples_of, tiny, tokenizer_of, write_world
from test_grpo import iterations, run

from pipeline import grpo
from pipeline.core.errors import UserError
from pipeline.rl.rollout import generate
from pipeline.rl.server import RolloutServer
from pipeline.rl.server_client import Request

STOP = SPECIAL.index("<|eos|>")


def config_of(folder, **server):
    options = {"command": str(folder / "vllm"), "start": 60, "answer": 2, "restarts": 2, **server}
    rollout = {"engine": "vllm", "max_new_tokens": 6, "temperature": 0.7, "batch": 4, "server": options}
    return grpo.Config(
        sources={"words": {"path": "x.jsonl"}},
        steps=1,
        batch_size=4,
        sequence_length=48,
        precision="fp32",
        rollout=rollout,
        update={"importance_cap": 2},
    )


@pytest.fixture(scope="module")
def policy():
    model = tiny(vocab_size=36, eos_token_id=STOP, num_key_value_heads=2)
    model.config.architectures = ["LlamaForCausalLM"]
    return model


@pytest.fixture
def serve(tmp_path):
    """serve(**options of rollout.server): a server that is not started yet."""
    fake_vllm.write(tmp_path)
    tokenizer_of().save_pretrained(tmp_path / "tokenizer")
    servers = []

    def made(**options):
        servers.append(RolloutServer(config_of(tmp_path, **options), [STOP], tmp_path / "tokenizer", tmp_path / "work"))
        return servers[-1]

    yield made
    for server in servers:
        server.close()


REQUESTS = [Request(sample.prompt_ids, 100 + sample.index) for sample in samples_of([(3, 1), (5, 1), (4, 1)] * 4)]


def complete(server, requests=REQUESTS, temperature=0.7):
    return server.complete(requests, max_new_tokens=6, temperature=temperature)


def expected(model, requests=REQUESTS, temperature=0.7):
    prompts, seeds = [each.prompt_ids for each in requests], [each.seed for each in requests]
    options = {"max_new_tokens": 6, "temperature": temperature, "stop_ids": [STOP], "pad_id": 0}
    return generate(model, prompts, seeds=seeds, **options)


def assert_same(found, wanted):
    assert [each.ids for each in found] == [each.ids for each in wanted]
    assert [each.stopped for each in found] == [each.stopped for each in wanted]
    for each, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each.logprobs, other.logprobs, atol=2e-5)


def changed(model):
    """A copy with other weights."""
    import copy

    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def test_the_responses_of_the_policy_before_and_after_new_weights(serve, policy, tmp_path):
    """Sampled and greedy; the server ends with its stage and leaves no weights behind."""
    server, other = serve(), changed(policy)
    server.update(policy)
    guard = server.process.process.pid
    running = fake_vllm.children_of(guard) | {guard}
    assert len(running) == 2
    assert_same(complete(server), expected(policy))
    assert_same(complete(server, temperature=0.0), expected(policy, temperature=0.0))
    server.update(other)
    assert_same(complete(server), expected(other))
    assert fake_vllm.log(tmp_path).count("start") == 1 and server.num_restarts == 0
    server.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in running) and not (tmp_path / "work/weights").exists()


def test_adapters_are_merged_in_what_is_served(serve, policy):
    import copy

    from pipeline.models import lora
    from pipeline.models.lora_config import Lora

    model, server = copy.deepcopy(policy), serve()
    lora.attach(model, Lora(rank=2), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    server.update(model)
    found = complete(server)
    assert_same(found, expected(model))
    assert [each.ids for each in found] != [each.ids for each in expected(policy)]


SLOW, OTHERS = pytest.mark.slow, ("nan", "short", "other")


@pytest.mark.parametrize("fault", ["error", "truncated", *(pytest.param(name, marks=SLOW) for name in OTHERS)])
def test_a_request_that_fails_is_made_again(serve, policy, tmp_path, fault):
    """At the same server, if it says that it is well."""
    server = serve()
    server.update(policy)
    fake_vllm.order(tmp_path, **{fault: 2})
    assert_same(complete(server), expected(policy))
    assert server.num_restarts == 0 and fake_vllm.log(tmp_path).count("start") == 1


@pytest.mark.parametrize("fault", ["hang", pytest.param("die", marks=SLOW)])
def test_a_server_that_is_lost_is_started_again(serve, policy, tmp_path, capfd, fault):
    """With the weights that it had, and only the responses that are missing are asked for again."""
    server = serve()
    server.update(policy)
    fake_vllm.order(tmp_path, **{fault: 1})
    begun = time.monotonic()
    assert_same(complete(server), expected(policy))
    assert time.monotonic() - begun < 40 and server.num_restarts == 1
    assert "the rollout server is started again (1 of 2): " in capfd.readouterr().out
    assert fake_vllm.log(tmp_path).count("/v1/completions") < 2 * len(REQUESTS)


@pytest.mark.slow
def test_a_stopped_server_is_found_by_the_clock(serve, policy):
    import signal

    server = serve()
    server.update(policy)
    (pid,) = fake_vllm.children_of(server.process.process.pid)
    os.kill(pid, signal.SIGSTOP)
    assert_same(complete(server), expected(policy))
    assert server.num_restarts == 1 and not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "faults, message",
    [
        pytest.param({"hang": fake_vllm.ALWAYS}, "was lost 2 times.*no answer within 2 s", marks=SLOW),
        pytest.param({"die": fake_vllm.ALWAYS}, "was lost 2 times.*(Disconnected|Refused|Reset)", marks=SLOW),
        pytest.param({"error": fake_vllm.ALWAYS}, "was lost 2 times.*HTTP 500.*EngineDeadError", marks=SLOW),
        ({"die": 1, "ends": fake_vllm.ALWAYS}, "ended while it was starting.*out of memory: the fake server has none"),
        ({"refuse": 1}, "refuses /v1/completions: HTTP 400.*prompt is too long"),
    ],
    ids=["hang", "die", "error", "ends", "refuse"],
)
def test_what_does_not_go_away_ends_with_its_name(serve, policy, tmp_path, faults, message):
    server = serve(restarts=1, answer=2)
    server.update(policy)
    fake_vllm.order(tmp_path, **faults)
    begun = time.monotonic()
    with pytest.raises(UserError, match=f"(?s){message}"):
        complete(server)
    assert time.monotonic() - begun < 60


def test_a_server_that_never_gets_well_ends_in_time(serve, policy, tmp_path):
    fake_vllm.order(tmp_path, deaf=fake_vllm.ALWAYS)
    with pytest.raises(UserError, match="(?s)was lost 1 time, .*not healthy 1 s after its start"):
        serve(restarts=0, start=1, answer=0.5).update(policy)


def test_stale_weights_are_found_by_their_checksums(serve, policy, tmp_path, capfd):
    """A reload that does nothing: the server is started again, and has the new weights."""
    server, other = serve(), changed(policy)
    server.update(policy)
    fake_vllm.order(tmp_path, stale=1)
    server.update(other)
    assert "its weights are not those that it was given" in capfd.readouterr().out and server.num_restarts == 1
    assert_same(complete(server), expected(other))


def test_closed_while_another_thread_waits(serve, policy, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    server = serve(answer=30)
    server.update(policy)
    fake_vllm.order(tmp_path, hang=fake_vllm.ALWAYS)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(complete, server)
        while "/v1/completions" not in fake_vllm.log(tmp_path):
            time.sleep(0.05)
        server.close()
        with pytest.raises(UserError, match="was ended with its stage"):
            future.result(20)
    assert fake_vllm.log(tmp_path).count("start") == 1


# ---- through a stage -------------------------------------------------------------------------------------------------

CAP = "grpo.update.importance_cap=2"


def words_of(folder, **server):
    options = {"command": str(folder / "vllm"), "answer": 20, "start": 120, **server}
    return [CAP, "grpo.rollout.engine=vllm", f"grpo.rollout.server={json.dumps(options)}"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("server"))
    fake_vllm.write(folder)
    return folder


def orphans(folder) -> list[str]:
    """Processes that belong to a server in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder / "vllm") in words:
            found.append(words.replace("\0", " "))
    return found


def test_a_run_with_a_server_is_the_run_without_it(world):
    """The fake server draws as the policy itself does: the same responses, and numbers up to rounding. Nothing of the
    server is left: no process, and no file in what is published."""
    fake_vllm.order(world, die=1)
    found, _, text = run(world, *words_of(world), output="served")
    alone, _, _ = run(world, CAP, output="alone")
    assert "grpo: the rollout server is started again (1 of 3)" in text
    for line, wanted in zip(iterations(found), iterations(alone), strict=True):
        for key in ("reward", "length_mean", "eos_rate"):
            assert line[key] == pytest.approx(wanted[key], abs=1e-6), key
        for key in ("policy_loss", "grad_norm", "entropy"):
            assert line[key] == pytest.approx(wanted[key], rel=2e-3, abs=1e-5), key
        assert line["rollout_difference"] < 2e-5 and line["sync_difference"] < 2e-5
    assert iterations(found)[-1]["server_restarts"] == 1
    assert (found / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()
    names = {path.relative_to(found).as_posix() for path in found.rglob("*")}
    assert {name for name in names if "rollout" in name} == {"logs/rollouts.jsonl"} and not orphans(world)


@pytest.mark.slow
def test_ahead_with_a_server_is_ahead_without_it(world):
    ahead = "grpo.rollout.ahead=true"
    found, _, _ = run(world, *words_of(world), ahead, output="served-ahead")
    alone, _, _ = run(world, CAP, ahead, output="alone-ahead")
    for line, wanted in zip(iterations(found), iterations(alone), strict=True):
        assert line["staleness"] == wanted["staleness"] and line["reward"] == pytest.approx(wanted["reward"], abs=1e-6)
        assert line["rollout_difference"] == pytest.approx(wanted["rollout_difference"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_killed_it_goes_on_with_the_same_prompts_and_leaves_no_server(world):
    """kill -9 of the stage: its server ends by itself."""
    whole, _, _ = run(world, *words_of(world), output="whole")
    for fault in ("work:1", "save:2"):
        code, text = stage("grpo", "group.yaml", "output=killed", *words_of(world), cwd=world, fault=fault)
        assert code == -9, text
        deadline = time.monotonic() + 30
        while orphans(world) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not orphans(world)
    found, _, _ = run(world, *words_of(world), output="killed")
    for line, wanted in zip(iterations(found), iterations(whole), strict=True):
        assert line["reward"] == pytest.approx(wanted["reward"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_share_a_server(world):
    from test_ppo import ranks

    alone, _, _ = run(world, *words_of(world), output="one")
    found, _ = ranks(world, *words_of(world), output="two", kind="grpo", recipe="group.yaml")
    for line, wanted in zip(iterations(found), iterations(alone), strict=True):
        assert line["reward"] == pytest.approx(wanted["reward"], abs=1e-6)
        assert line["policy_loss"] == pytest.approx(wanted["policy_loss"], rel=2e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stage_ends_with_the_name_of_what_is_wrong_with_its_server(world, processes):
    """Weights that only log-probabilities show to be old; no rank waits for the others."""
    fake_vllm.order(world, liar=fake_vllm.ALWAYS)
    words = [*words_of(world, restarts=0), f"output=liar-{processes}", "grpo.optimizer.lr=0.3"]
    if processes == 1:
        answers = [stage("grpo", "group.yaml", *words, cwd=world)]
    else:
        answers = failing_ranks(world, words)
    fake_vllm.order(world, liar=0)
    for code, text in answers:
        assert code == 2 and "Traceback" not in text
    assert "with new weights, its log-probabilities differ by" in answers[0][1] and not orphans(world)


def failing_ranks(world, words):
    import socket
    from concurrent.futures import ThreadPoolExecutor

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def one(rank):
        env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return stage("grpo", "group.yaml", *words, cwd=world, env=env)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused(tmp_path):
    from pydantic import ValidationError

    keys = config_of(tmp_path).model_dump(exclude_unset=True)
    with pytest.raises(ValidationError, match="engine: vllm: a server computes other log-probabilities.*give importa"):
        grpo.Config(**keys | {"update": {}})
    with pytest.raises(ValidationError, match="server is for engine: vllm, not transformers; remove it"):
        grpo.Config(**keys | {"rollout": {"max_new_tokens": 6, "server": {"restarts": 1}}})
    with pytest.raises(ValidationError, match="lora.base: nf4"):
        grpo.Config(**keys | {"lora": {"base": "nf4"}})
    with pytest.raises(ValidationError, match="3 starts of 60 s each are more than watch.start: 100"):
        grpo.Config(**keys | {"watch": {"start": 100}})
    config = grpo.Config(**keys | {"kind": "grpo"})
    with pytest.raises(UserError, match="stage grpo: rollout.server.command: there is no program .*/vllm'"):
        config.check_machine()


# ---- a real server ---------------------------------------------------------------------------------------------------

REAL = os.environ.get("ALMA_TEST_VLLM")  # a program `vllm`, such as /opt/vllm/bin/vllm


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="ALMA_TEST_VLLM names no vLLM")
def test_a_real_server(tmp_path, monkeypatch):
    """Start, new weights, log-probabilities, stop ids, greedy tokens, one seed twice, a lost engine, and the end."""
    # its first request would compile kernels for minutes; its tokens are kept in 1 GiB
    for name, value in {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        monkeypatch.setenv(name, value)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny(vocab_size=36, eos_token_id=STOP, **sizes)
    model.config.architectures = ["LlamaForCausalLM"]
    other = changed(model)
    tokenizer_of().save_pretrained(tmp_path / "tokenizer")
    config = config_of(tmp_path, command=REAL, arguments=["--enforce-eager"], start=1100, answer=300)
    server = RolloutServer(config, [STOP, 7, 9], tmp_path / "tokenizer", tmp_path / "work")
    try:
        for policy in (model, other):
            server.update(policy)
            assert server.num_restarts == 0, "new weights were not read"
            found = complete(server)
            assert_logprobs(policy, found)
            assert {each.stopped for each in found} == {True, False}
            assert [each.ids for each in complete(server)] == [each.ids for each in found]
            greedy = complete(server, temperature=0.0)
            options = {"max_new_tokens": 6, "temperature": 0.0, "stop_ids": [STOP, 7, 9], "pad_id": 0}
            prompts = [each.prompt_ids for each in REQUESTS]
            wanted = generate(policy, prompts, seeds=[0] * len(prompts), **options)
            assert [each.ids for each in greedy] == [each.ids for each in wanted]
        running = fake_vllm.children_of(server.process.process.pid)
        for pid in running:
            if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, 9)
        assert_logprobs(other, complete(server))
        assert server.num_restarts == 1
        running |= fake_vllm.children_of(server.process.process.pid)
    finally:
        server.close()
    deadline = time.monotonic() + 20  # those that have been killed are still ending
    while any(Path(f"/proc/{pid}").exists() for pid in running) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)


def assert_logprobs(model, found):
    """Against a forward pass of the same ids."""
    for request, each in zip(REQUESTS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt_ids + each.ids])).logits[0, len(request.prompt_ids) - 1 : -1]
        logprobs = (logits / 0.7).log_softmax(-1)[range(len(each.ids)), each.ids]
        np.testing.assert_allclose(each.logprobs, logprobs, atol=3e-5)
