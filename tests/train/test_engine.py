"""The engine in one process: against a plain loop, and under injected harm."""

import json
import math

import pytest
import torch
from counted import Counted
from device_reads import Reads
from pydantic import ValidationError
from tiny_engine import INFINITE, LENGTH, ROWS, SMALL, batch_of, config, loss_fn, output_in, rows, spoiled, tiny
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuned import tokenizer as make_tokenizer

from pipeline.core.errors import UserError
from pipeline.models import build, model_block, pipeline_split, row_attention
from pipeline.models.publish import publish
from pipeline.train import checkpoints, engine
from pipeline.train.config import Parallel, Schedule, TrainConfig
from pipeline.train.loop import fit, share
from pipeline.train.loss import cross_entropy_sum, token_logprobs
from pipeline.train.schedule import learning_rate


def plain_loop(steps: int, settings: TrainConfig):
    """The whole batch at once, torch's parts, no engine."""
    model = tiny()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    o = settings.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=o.betas,
        eps=o.eps,
        foreach=False,
        fused=False,
    )
    found = []
    for step in range(steps):
        ids, labels = rows(step)
        loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.schedule, o.lr, step, settings.steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return model, found


@pytest.mark.parametrize(
    "capability, precision, warned", [("avx512_bf16", "bf16", 0), ("avx2", "fp32", 0), ("avx2", "bf16", 1)]
)
def test_bf16_on_a_processor_without_it_is_warned_of_once(monkeypatch, capsys, capability, precision, warned):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": capability == "avx512_bf16"}
    )
    settings = config(precision=precision, kind="toy")
    for _ in range(2):
        engine.build(tiny(), loss_fn, settings)
    assert capsys.readouterr().out.count("toy: WARNING: precision: bf16 is slower than fp32") == warned


@pytest.mark.parametrize("micro", [None, 4, 2, 1])
def test_any_micro_batch_gives_the_steps_of_a_plain_loop(micro):
    """Relative 1e-5 for losses and norms of 6 clipped steps; weights to a thousandth of what a step changes (Adam
    divides small gradients by their own size)."""
    settings = config(micro_batch=micro)
    reference, expected = plain_loop(6, settings)
    trainer = engine.build(tiny(), loss_fn, settings)
    for step, (loss, norm) in enumerate(expected):
        found = trainer.step([batch_of(step, part) for part in share(settings, trainer, step)])
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > settings.optimizer.max_grad_norm
        assert found["applied"] and 0 <= found["accuracy"] <= 1
    for name, weight in trainer.consolidated().items():
        assert torch.allclose(weight, reference.state_dict()[name], atol=1e-4), name


def test_evaluation_is_the_mean_over_labels_and_leaves_no_trace():
    settings = config()
    trainer = engine.build(tiny(), loss_fn, settings)
    ids, labels = rows(0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            tiny()(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        ).item()
    found = trainer.evaluate([batch_of(0, range(0, 3)), batch_of(0, range(3, 8))])
    assert found["loss"] == pytest.approx(expected, rel=1e-6) and found["weight"] == (labels >= 0).sum()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_forward_gives_what_is_read_of_each_micro_batch():
    trainer = engine.build(tiny(), loss_fn, config())
    ids, _ = rows(0)
    with torch.no_grad():
        expected = tiny()(ids).logits[:, -1]
    batches = [batch_of(0, range(0, 3)), batch_of(0, range(3, 8))]
    found = trainer.forward(batches, lambda logits, batch: logits[:, -1])
    assert [len(rows) for rows in found] == [3, 5]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-6, atol=1e-6)
    assert trainer.step(batches)["loss"] == pytest.approx(engine.build(tiny(), loss_fn, config()).step(batches)["loss"])


@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
def test_what_is_not_finite_does_not_reach_the_weights(zero):
    """Harmed steps, the first of all among them, leave weights and moments alone: the others are, bit for bit, those
    of a run that never saw harm."""

    def run(order):
        trainer = engine.build(tiny(), spoiled, config(parallel={"zero": zero}, micro_batch=4))
        found = []
        for step, spoil in order:
            batches = [batch_of(step, part) for part in (range(0, 4), range(4, 8))]
            batches[1]["spoil"] = spoil
            found.append(trainer.step(batches, lr=1e-3))
        return found, trainer.consolidated()

    harmed, weights = run(
        [(9, INFINITE), (0, None), (1, "nan loss"), (1, "nan gradient"), (2, None), (3, INFINITE), (3, None)]
    )
    clean, expected = run([(0, None), (2, None), (3, None)])
    assert [stats["applied"] for stats in harmed] == [False, True, False, False, True, False, True]
    assert all(
        math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"]) for stats in harmed if stats["applied"]
    )
    assert [stats for stats in harmed if stats["applied"]] == clean
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_bf16_keeps_fp32_weights_and_stays_near_fp32():
    """Losses of 6 steps within 1% of fp32 (bf16 has 8 bits of mantissa: 0.4% a product)."""
    found = {}
    for precision in ("fp32", "bf16"):
        settings = config(precision=precision)
        trainer = engine.build(tiny(), loss_fn, settings)
        found[precision] = [trainer.step([batch_of(step, range(ROWS))])["loss"] for step in range(6)]
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert found["bf16"] == pytest.approx(found["fp32"], rel=1e-2) and found["bf16"] != found["fp32"]


@pytest.mark.parametrize("adapters", [False, True])
def test_casts_that_are_kept_for_all_micro_batches_change_no_bit(adapters):
    """Against autocast around each micro-batch alone, also with weights that get no gradient, and in the next step with
    the weights that the first one has changed."""
    settings = config(precision="bf16")
    trained, plain = tiny(), tiny()
    for model in (trained, plain):
        model.model.layers[0].requires_grad_(not adapters)
    here = engine.build(trained, loss_fn, settings)
    batches = [[batch_of(step, range(start, start + 2)) for start in range(0, ROWS, 2)] for step in (0, 1)]
    optimizer = engine.adamw(plain.parameters(), settings, torch.device("cpu"))
    for step in batches:
        stats = here.step(step, 3e-3)
        for batch in step:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = plain(**batch["inputs"], use_cache=False).logits
            (loss_fn(logits, batch)[0] / stats["weight"]).backward()
        engine.clip_gradients(list(plain.parameters()), settings.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name)), name


def test_activation_checkpointing_does_not_change_a_bit():
    found = []
    for on in (False, True):
        trainer = engine.build(tiny(), loss_fn, config(activation_checkpointing=on))
        found.append([trainer.step([batch_of(step, range(ROWS))]) for step in range(3)])
    assert found[0] == found[1]


def test_the_gradient_norm_of_a_large_table_is_right():
    """Gradients of a word table: many rows near zero, some large. torch's own norm is off by 3e-5 here on a CPU;
    2e-7 of the norm in fp64 is asked."""
    draw = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.zeros(4096, 256))
    table.grad = torch.randn(4096, 256, generator=draw) * torch.rand(4096, 1, generator=draw) ** 8
    expected = table.grad.double().norm().item()
    direction = table.grad / expected
    norm = engine.clip_gradients([table, torch.nn.Parameter(torch.zeros(2))], 0.5)
    assert norm.item() == pytest.approx(expected, rel=2e-7)
    assert torch.allclose(table.grad, 0.5 * direction, rtol=1e-5)


def test_decay_is_for_matrices_alone():
    trainer = engine.build(tiny(), loss_fn, config())
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in trainer.optimizer.param_groups}
    for name, parameter in trainer.model.named_parameters():
        assert id(parameter) in groups[0.0 if "norm" in name else 0.1], name


def test_learning_rate():
    def at(step, steps=100, **keys):
        return learning_rate(Schedule(**keys), 1.0, step, steps)

    assert [at(step, warmup_steps=4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert (
        at(0, min_ratio=0.1) == 1.0
        and at(50, min_ratio=0.1) == pytest.approx(0.55)
        and at(99, min_ratio=0.1) == pytest.approx(0.1, abs=1e-3)
    )
    assert at(75, kind="linear", min_ratio=0.0) == 0.25
    assert at(99, kind="constant") == 1.0
    assert at(79, kind="wsd", min_ratio=0.0) == 1.0 and at(90, kind="wsd", min_ratio=0.0) == 0.5


def test_losses_against_torch():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, 6, 0], [-100, -100, 3, 3, 5]])
    expected = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    assert torch.allclose(token_logprobs(logits, labels), expected, atol=1e-6)
    assert cross_entropy_sum(logits, labels).item() == pytest.approx(-expected.sum().item(), rel=1e-6)


# ---- checkpoints and the loop ----------------------------------------------------------------------------------------


def train(folder, steps: int, total: int = 6, spoil: int | None = None):
    """Train to `steps` of `total` by the loop in a fresh engine; returns (result, weights)."""
    settings = config(steps=total, schedule={"kind": "constant"})
    output = output_in(folder)
    try:
        trainer = engine.build(tiny(attention_dropout=0.1), loss_fn, settings)

        def batches(step):
            batch = batch_of(step, range(ROWS))
            if step == spoil:
                batch["inputs"]["input_ids"] = batch["inputs"]["input_ids"].clone()
                trainer.model.lm_head.register_forward_hook(
                    lambda *a: a[2] * float("nan") if trainer.step_count == spoil else None
                )
            return [batch]

        result = fit(
            trainer,
            settings.model_copy(update={"steps": steps}),
            output,
            batches,
            evaluate=lambda: trainer.evaluate([batch_of(99, range(ROWS))]),
        )
        return result, trainer.consolidated(), output.path
    finally:
        output.close()


def test_a_run_in_parts_is_the_run_in_one(tmp_path):
    """Dropout on, so the random state counts too. Bit for bit, and so are the numbers that are reported."""
    whole, expected, path = train(tmp_path / "whole", 6)
    for steps in (1, 4, 6):
        parts, weights, _ = train(tmp_path / "parts", steps)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert all(parts[key] == whole[key] for key in ("before", "after", "first", "last", "weight", "skipped"))
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-000004", "step-000006"], (
        "two newest are kept"
    )


def test_a_rollback_without_a_whole_checkpoint_ends_in_a_sentence(tmp_path):
    settings = config(
        schedule={"kind": "constant"},
        spikes={"policy": "rollback", "sigma": 1000, "window": 4},
        save={"every_steps": 2, "asynchronous": False},
    )
    output = output_in(tmp_path)
    trainer = engine.build(tiny(), loss_fn, settings)

    def batches(step):
        if step == 3:
            trainer.model.lm_head.register_forward_hook(lambda *a: a[2] * 1e4)
            for file in (output.path / "checkpoints").glob("step-*/*.safetensors"):
                file.write_bytes(b"")
        return [batch_of(step, range(ROWS))]

    with pytest.raises(
        UserError, match=r"step 4 is to be rolled back, and no checkpoint in .* is complete; start again"
    ):
        fit(trainer, settings, output, batches)
    output.close()


def test_dropout_is_another_in_each_step(tmp_path):
    """The same rows again and again, and no learning to speak of: only the dropout's draws are left to move the
    loss."""
    settings = config(
        schedule={"kind": "constant"}, optimizer={"lr": 1e-12, "weight_decay": 0.0}, log={"every_steps": 1}
    )
    output = output_in(tmp_path)
    trainer = engine.build(tiny(attention_dropout=0.5), loss_fn, settings)
    fit(trainer, settings, output, lambda step: [batch_of(0, range(ROWS))])
    output.close()
    lines = [json.loads(line) for line in (output.path / "metrics.jsonl").read_text().splitlines()]
    assert len({line["loss"] for line in lines if "grad_norm" in line}) == 6


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "marker cut", "no marker"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, harm):
    _, _, path = train(tmp_path, 4)
    folder = path / "checkpoints" / "step-000004"
    file = folder / ("complete.json" if "marker" in harm else "model-00000.safetensors")
    data = file.read_bytes()
    if harm in ("missing", "no marker"):
        file.unlink()
    elif harm == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        file.write_bytes(data[: len(data) // 2])
    output = output_in(tmp_path)
    found, state = checkpoints.newest(output)
    output.close()
    assert found.name == "step-000002" and state["weight"] > 0
    said = capsys.readouterr().out
    assert ("step-000004" in said and "skipping it" in said) or harm == "no marker", said


def test_a_skipped_step_is_logged_and_counted(tmp_path, capsys):
    result, _, path = train(tmp_path, 4, spoil=2)
    assert result["skipped"] == 1 and "step 3 was skipped" in capsys.readouterr().out
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line.get("applied") is False] == [None]


def test_a_launcher_that_names_another_zero_stage_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError, match="zero: 2.*zero_stage: 3"):
        engine.build(tiny(), loss_fn, config(parallel={"zero": 2}))
    with pytest.raises(UserError, match="none.*zero_stage: 3"):
        engine.build(tiny(), loss_fn, config())


def test_layouts_that_cannot_be_had_are_refused_before_anything_starts():
    with pytest.raises(ValidationError, match="pipeline: 2 cannot be combined with zero: 3"):
        config(parallel={"zero": 3, "pipeline": 2})
    with pytest.raises(ValidationError, match="offload needs"):
        config(parallel={"offload": True})
    with pytest.raises(UserError, match="batch_size 8 is not divisible by 3"):
        config().check(3)
    with pytest.raises(UserError, match="not divisible by micro_batch 3"):
        config(micro_batch=3).check(1)


# ---- models ----------------------------------------------------------------------------------------------------------

FAMILIES = [
    {"family": "llama", **SMALL},
    {"family": "llama", **SMALL, "tie_word_embeddings": True, "pad_vocab_to": 64},
    {"family": "qwen3", **SMALL, "head_dim": 16},
    {"family": "mixtral", **SMALL, "num_local_experts": 2},
    {"family": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(folder), folder


@pytest.mark.parametrize("block", FAMILIES, ids=lambda block: block["family"] + "-tied" * ("pad_vocab_to" in block))
def test_a_model_is_a_function_of_its_seed_and_survives_publishing(block, tokenizer, tmp_path):
    made, folder = tokenizer
    model, again, other = (build.new(block, made, 64, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert model.get_input_embeddings().weight[5].std().item() == pytest.approx(model.config.initializer_range, rel=0.5)
    assert model.config.max_position_embeddings == 64 and model.config.vocab_size % block.get("pad_vocab_to", 1) == 0
    ids = torch.arange(20)[None]
    publish(model.state_dict(), model.config, folder, tmp_path / "one")
    publish(model.state_dict(), model.config, folder, tmp_path / "two")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}, "equal input, equal bytes"
    loaded, reader = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "one"),
        AutoTokenizer.from_pretrained(tmp_path / "one"),
    )
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert (
        loaded.generation_config.eos_token_id == [reader.eos_token_id, reader.convert_tokens_to_ids("<|im_end|>")]
        and reader.chat_template
    )
    head = build.load(tmp_path / "one", "reward", seed=3)
    assert torch.equal(
        head.score.weight, build.load(tmp_path / "one", "reward", seed=3).score.weight
    ) and head.score.weight.shape == (1, 32)


@pytest.mark.parametrize(
    "block, said",
    [
        (None, "no model block"),
        ({"family": "lama"}, "did you mean llama"),
        ({"family": "llama", "hiden_size": 8}, "did you mean hidden_size"),
        ({"family": "llama", "vocab_size": 8}, "the tokenizer decides"),
        ({"family": "llama", "hidden_size": 30, "num_attention_heads": 4}, "30"),
        (
            {"family": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads 3",
        ),
    ],
)
def test_a_wrong_model_block_is_named(block, said):
    with pytest.raises(UserError, match=said):
        model_block.check(block)


# ---- pipeline stages -------------------------------------------------------------------------------------------------


def test_a_family_or_depth_that_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match="gemma cannot be cut"):
        pipeline_split.check(type("C", (), {"model_type": "gemma"}))
    with pytest.raises(UserError, match="the model has 3"):
        pipeline_split.split(tiny(), Parallel(pipeline=4), LENGTH)
    with pytest.raises(UserError, match="add up to 3"):
        pipeline_split.split(tiny(), Parallel(pipeline=2, layers=[1, 1]), LENGTH)
    with pytest.raises(ValidationError, match="has 3 entries, but pipeline is 2"):
        Parallel(pipeline=2, layers=[1, 1, 1])


def test_layers_are_shared_out_by_cost():
    def sizes(**keys):
        shape = {"num_hidden_layers": 10, "hidden_size": 64, "intermediate_size": 128, **keys.pop("shape", {})}
        return [len(part) for part in pipeline_split.split(tiny(**shape), Parallel(**keys), LENGTH)]

    assert (
        sizes(pipeline=4) == [2, 3, 3, 2]
        and sizes(pipeline=4, partition="uniform") == [3, 3, 2, 2]
        and sizes(pipeline=2, layers=[7, 3]) == [7, 3]
    )
    costs, slowest = [3.0, 1, 1, 1, 2, 1, 1], []
    for output in (0.0, 1.5, 4.0):
        found = pipeline_split.partition(costs, output, 3)
        cuts = [(a, b) for a in range(1, 6) for b in range(a + 1, 7)]
        everything = {(a, b): max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:]) + output) for a, b in cuts}
        assert everything[found[0].stop, found[1].stop] == min(everything.values()) and found[-1].stop == 7
        slowest.append(len(found[-1]))
    assert slowest == sorted(slowest, reverse=True) and slowest[0] > slowest[-1], (
        "a dear output layer leaves fewer layers to the last stage"
    )


def test_a_model_that_is_filled_in_parts_trains_as_a_complete_one(tmp_path):
    """As on GPUs, where each part is moved before the next one is read: weights and a step to the bit."""
    make_tokenizer(tmp_path / "tokenizer")
    source = tiny(tie_word_embeddings=True)
    source.config.architectures = ["LlamaForCausalLM"]
    publish(source.state_dict(), source.config, tmp_path / "tokenizer", tmp_path / "model")
    settings, found = config(micro_batch=2), []
    for model, weights in (build.skeleton(tmp_path / "model"), (build.load(tmp_path / "model"), None)):
        trainer = engine.build(model, loss_fn, settings, fill=weights)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        stats = trainer.step([batch_of(0, part) for part in share(settings, trainer, 0)])
        found.append((stats, trainer.consolidated()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())


@pytest.mark.parametrize("parallel", [{}, {"shard": "full"}])
def test_matrices_are_multiplied_in_bf16(parallel):
    """All products of a step with `precision: bf16`, forward and backward; with fp32 none."""
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        settings = config(parallel=parallel, micro_batch=2, precision=precision)
        trainer = engine.build(tiny(), loss_fn, settings)
        with Counted() as counted:
            trainer.step([batch_of(0, part) for part in share(settings, trainer, 0)])
        assert counted.products == {(dtype, dtype)}


class Copies(TorchDispatchMode):
    """Tensors in bf16 with the shape of a matrix of the model, and which of them are still alive."""

    def __init__(self, model):
        super().__init__()
        self.shapes = {tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name}
        self.references: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.bfloat16 and tuple(output.shape) in self.shapes:
            reference = StorageWeakRef(output.untyped_storage())
            self.references[reference.cdata] = reference
        return output

    def alive(self) -> int:
        return sum(not reference.expired() for reference in self.references.values())


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_recomputed_layers_keep_no_copies_of_their_weights(checkpointing, monkeypatch):
    """After a forward pass in bf16: with activation checkpointing none of the copies that autocast makes of the 21
    matrices of three layers are in memory, 2 bytes a parameter; without it all are."""
    # DeepSpeed replaces it for the rest of a process that has had ZeRO-3, and then nothing is kept.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    model = tiny()
    trainer = engine.build(model, loss_fn, config(precision="bf16", activation_checkpointing=checkpointing))
    ids = torch.zeros(3, LENGTH, dtype=torch.long)  # 36 tokens: no activation has the shape of a matrix
    with Copies(model) as copies, trainer._autocast():
        outputs = model(input_ids=ids, use_cache=False).logits
        assert len(copies.references) >= 21
        assert copies.alive() == (21 if checkpointing == "none" else 0)
    outputs.sum().backward()


@pytest.mark.parametrize("parallel", [{}, {"shard": "full"}])
def test_a_step_reads_the_device_once(parallel):
    """Losses, further sums and the gradient norm are read together (Sums.read); nothing else asks for a value."""
    settings = config(parallel=parallel, micro_batch=2)
    model = tiny()
    row_attention.install(model)
    trainer = engine.build(model, loss_fn, settings)
    batches = [batch_of(0, part) for part in share(settings, trainer, 0)]
    for batch in batches:
        batch["inputs"]["position_ids"] = torch.arange(LENGTH).remainder(5).repeat(2, 1)
    assert trainer.step(batches)["applied"]
    with Reads() as reads:
        assert trainer.step(batches)["applied"]
    assert reads.count == 0
