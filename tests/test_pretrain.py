"""The pretraining stage as a user starts it: what comes out, kills at every point, stopping, and mistakes."""

import json
import math
import random
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from harness import files_of, launch, stage, succeed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.core import recipe
from pipeline.core.errors import UserError
from pipeline.core.graph import check, nodes
from pipeline.data.tokens.heldout_rows import heldout_rows
from pipeline.data.tokens.store import TokenStore
from pipeline.models import build
from pipeline.models.model_block import changed_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs, the recipe, and an uninterrupted run in runs/."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    said = succeed("pretrain", "recipe.yaml", cwd=folder)
    return folder, said


def published(folder, runs="runs"):
    return folder / runs / "tiny" / "pretrain" / "current"


def metrics(folder, runs="runs") -> dict:
    return json.loads((published(folder, runs) / "manifest.json").read_text())["metrics"]


def bits_per_byte(folder, model) -> float:
    """By transformers and the stored text sizes alone: the first 5 rows of each source, each read with an eos before
    its first token."""
    nats = size = 0
    for source in ("one", "two"):
        store = TokenStore(folder / "tokens", "heldout")
        stream = np.concatenate([[store.eos_id], store.read(source, 0, 5 * 32)]).astype(np.int64)
        for row in range(5):
            ids = torch.from_numpy(stream[row * 32 : row * 32 + 33])[None]
            nats += 32 * model(input_ids=ids, labels=ids).loss.item()
            size += int(store.token_bytes[ids[0, 1:]].sum())
    return nats / math.log(2) / size


def test_the_model_is_what_the_metrics_say(world):
    folder, said = world
    found = metrics(folder)
    model = AutoModelForCausalLM.from_pretrained(published(folder) / "model").eval()
    with torch.no_grad():
        assert found["bits_per_byte_after"] == pytest.approx(bits_per_byte(folder, model), rel=1e-5)
    assert found["bits_per_byte_after"] < found["bits_per_byte_before"] and found["loss_before"] == pytest.approx(
        math.log(290), abs=0.1
    )
    assert found["parameters"] == model.num_parameters() and found["tokens"] == 6 * 8 * 32
    assert f"{model.num_parameters():,} parameters" in said and "1,536 tokens = 6 steps x 8 rows x 32" in said
    assert set(found["bits_per_byte_sources"]) == {"one", "two"}
    tokenizer = AutoTokenizer.from_pretrained(published(folder) / "model")
    assert tokenizer.decode(model.generate(**tokenizer("ape bee", return_tensors="pt"), max_new_tokens=3)[0])
    lines = [json.loads(line) for line in (published(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4, 5, 6] and lines[0][
        "heldout_bits_per_byte"
    ] == found["bits_per_byte_before"]


def test_it_learns_what_follows_what(world):
    """A word is followed by the next of the list in nine of ten cases; 2.71 bits a byte at the start, under 0.6
    after 150 steps."""
    folder, _ = world
    succeed(
        "pretrain",
        "recipe.yaml",
        "output=learn",
        "pretrain.steps=150",
        "pretrain.optimizer.lr=1e-2",
        "pretrain.precision=bf16",
        "pretrain.save.every_steps=150",
        cwd=folder,
    )
    assert metrics(folder, "learn")["bits_per_byte_after"] < 0.6


@pytest.mark.parametrize(
    "faults",
    [["work:1"], ["work:3", "work:2"], ["save:1", "save:2"], ["save:3", "publish:1"], ["publish:2"]],
    ids=lambda f: "-".join(f).replace(":", ""),
)
def test_killed_and_started_again_it_ends_the_same(world, faults):
    folder, _ = world
    runs = "killed-" + "-".join(faults).replace(":", "")
    for fault in faults:
        code, text = stage(
            "pretrain", "recipe.yaml", f"output={runs}", "pretrain.save.asynchronous=false", cwd=folder, fault=fault
        )
        assert code == -9, f"{fault}: {code}\n{text}"
    said = succeed("pretrain", "recipe.yaml", f"output={runs}", cwd=folder)
    assert files_of(published(folder, runs)) == files_of(published(folder))
    expected, found = metrics(folder), metrics(folder, runs)
    for key in set(expected) - {"tokens_per_second"}:
        assert found[key] == expected[key], key
    steps = [
        json.loads(line)["step"]
        for line in (published(folder, runs) / "metrics.jsonl").read_text().splitlines()
        if "grad_norm" in line
    ]
    assert steps == [1, 2, 3, 4, 5, 6], "the curve runs once"
    assert ("resuming from step-" in said) == (faults[-1] not in ("work:1", "publish:2") and faults != ["save:1"])


def test_killed_at_random_moments_it_ends_the_same(world):
    folder, _ = world
    draw = random.Random(7)
    for _ in range(6):
        code, text = stage("pretrain", "recipe.yaml", "output=random", cwd=folder, kill_after=draw.uniform(0.2, 1.5))
        if code == 0:
            break
        assert code == -9, text
    succeed("pretrain", "recipe.yaml", "output=random", cwd=folder)
    assert files_of(published(folder, "random")) == files_of(published(folder))


def test_a_fork_to_a_longer_horizon_goes_on_from_the_last_checkpoint(world):
    folder, _ = world
    succeed("pretrain", "recipe.yaml", "output=fork", cwd=folder)
    said = succeed("pretrain", "recipe.yaml", "output=fork", "pretrain.steps=8", "--fork", cwd=folder)
    assert "resuming from step-000006" in said and metrics(folder, "fork")["tokens"] == 8 * 8 * 32


def test_it_goes_on_from_another_pretraining_stage_and_other_layouts_of_memory_change_nothing(world):
    """A second stage with a schedule of its own begins where the first ended; micro-batches and recomputed
    activations are execution, so no new run."""
    folder, _ = world
    (folder / "two.yaml").write_text(
        tiny.RECIPE
        + "  anneal:\n    kind: pretrain\n    inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: pretrain}\n   "
        " sequence_length: 32\n    batch_size: 8\n    steps: 2\n    precision: fp32\n    mixture: {two: 1}\n   "
        " heldout_rows: 10\n    optimizer: {lr: 1e-4}\n"
    )
    succeed("pretrain", "two.yaml", "--stage", "anneal", cwd=folder)
    first = metrics(folder)
    second = json.loads((folder / "runs/tiny/anneal/current/manifest.json").read_text())["metrics"]
    assert second["bits_per_byte_before"] == pytest.approx(first["bits_per_byte_after"], rel=1e-6)
    assert second["bits_per_byte_after"] != second["bits_per_byte_before"]
    assert "up to date" in succeed(
        "pretrain", "recipe.yaml", "pretrain.micro_batch=2", "pretrain.activation_checkpointing=true", cwd=folder
    )


@pytest.mark.parametrize(
    "word, said",
    [
        ("pretrain.mixture={one: 1, tow: 1}", "two"),
        ("model.family=lama", "did you mean llama"),
        ("model.hiden_size=3", "did you mean hidden_size"),
        ("pretrain.parallel.pipeline=2", "1 process cannot be divided into pipeline: 2"),
        ("pretrain.micro_batch=3", "not divisible by micro_batch 3"),
        ("pretrain.sequence_length=100000", "sequence_length"),
        ("pretrain.inputs={tokens: ./tokenizer, tokenizer: ./tokenizer}", "index.json"),
        ("pretrain.parallel={zero: 3}", "cannot be combined with zero: 3"),
    ],
)
def test_mistakes_are_one_sentence(world, word, said):
    folder, _ = world
    code, text = stage(
        "pretrain",
        "recipe.yaml",
        "output=wrong",
        word,
        *(["pretrain.compile=true"] if "zero" in word else []),
        cwd=folder,
    )
    assert code == 2 and said in text and "Traceback" not in text and text.count("error:") == 1, text


# ---- going on from a model -------------------------------------------------------------------------------------------

LONGER = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


def test_a_hub_folder_goes_on_with_longer_rows(world, tmp_path):
    """Twice the context by scaled positions. What training starts from has the logits of transformers' model with
    the same configuration, and so has what it publishes."""
    folder, _ = world
    source = published(folder) / "model"
    copy = tmp_path / "by-hand"
    shutil.copytree(source, copy)
    written = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**written, "rope_parameters": LONGER, "max_position_embeddings": 64}))
    ids = torch.randint(3, 290, (2, 64), generator=torch.Generator().manual_seed(0))
    by_hand, plain = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (copy, source))
    ours = build.load(source, config=changed_config(source, {"rope_parameters": LONGER}, 64)).eval()
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, by_hand(ids).logits) and not torch.allclose(
            ours(ids).logits, plain(ids).logits, atol=1e-4
        )
    (folder / "hub").exists() or shutil.copytree(source, folder / "hub")
    block = (
        "  longer: {kind: pretrain, inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: ./hub}, sequence_length:"
        " 64, batch_size: 4, steps: 2, precision: fp32, heldout_rows: 4"
    )
    (folder / "longer.yaml").write_text(
        tiny.RECIPE + block + f", model_changes: {{rope_parameters: {json.dumps(LONGER)}}}}}\n"
    )
    succeed("pretrain", "longer.yaml", "--stage", "longer", cwd=folder)
    made = AutoModelForCausalLM.from_pretrained(folder / "runs/tiny/longer/current/model")
    assert made.config.max_position_embeddings == 64 and made.config.rope_parameters["rope_type"] == "yarn"
    for word, said in [
        ("model_changes={}", "more than the 32 positions"),
        ("model_changes={hidden_size: 64}", "would change the shape of"),
        ("model_changes={rope: 1}", "has no such key"),
    ]:
        code, text = stage(
            "pretrain",
            "longer.yaml",
            "--stage",
            "longer",
            "output=wrong",
            f"longer.{word}",
            *([] if "{}" in word else ["longer.sequence_length=32"]),
            cwd=folder,
        )
        assert code == 2 and said in text and "Traceback" not in text, text


def test_longer_rows_without_positions_are_refused_before_anything_runs(world, monkeypatch):
    folder, _ = world
    anneal = (
        "  anneal: {kind: pretrain, inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: pretrain},"
        " sequence_length: 64, batch_size: 4, steps: 2}\n"
    )
    (folder / "anneal.yaml").write_text(tiny.RECIPE + anneal)
    monkeypatch.chdir(folder)
    graph = nodes(recipe.load("anneal.yaml"))
    with pytest.raises(UserError, match="64 tokens are more than the 32 positions"):
        check(graph["anneal"], graph)
    graph = nodes(recipe.load("anneal.yaml", [f"anneal.model_changes={{rope_parameters: {json.dumps(LONGER)}}}"]))
    check(graph["anneal"], graph)


def test_a_model_with_other_tokens_is_refused(world):
    folder, _ = world
    other = folder / "other"
    other.exists() or shutil.copytree(published(folder) / "model", other)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    code, text = stage("pretrain", "recipe.yaml", "output=wrong", "pretrain.inputs.model=./other", cwd=folder)
    assert code == 2 and "is not the tokenizer of inputs.model" in text, text


MORE = """
name: more
stages:
  tokenizer: {inputs: {data: ./news}, adopt: ./grown, add_tokens: 20}
  pack: {inputs: {data: ./news}, workers: 1}
  pretrain:
    {inputs: {model: ./grown}, sequence_length: 32, batch_size: 8, steps: 2, precision: fp32, heldout_rows: 10,
     optimizer: {lr: 1e-9}}
"""


@pytest.fixture(scope="module")
def grown(world):
    """A model that goes on with more tokens than it had, on one process."""
    folder, _ = world
    shutil.copytree(published(folder) / "model", folder / "grown")
    draw = random.Random(0)
    for split, count in (("train", 120), ("heldout", 40)):
        (folder / "news" / split).mkdir(parents=True)
        texts = ["".join(draw.choices(["明月光", "故乡的", "大象", "黄河水", "。"], k=30)) for _ in range(count)]
        table = {"text": texts, "source": ["zh"] * count, "id": [f"{split}{i}" for i in range(count)]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "news" / split / "part-00000.parquet")
    (folder / "more.yaml").write_text(MORE)
    for kind in ("tokenizer", "pack"):
        succeed(kind, "more.yaml", cwd=folder)
    return folder, succeed("pretrain", "more.yaml", cwd=folder)


def test_a_model_goes_on_with_tokens_added_to_its_tokenizer(grown):
    """Old rows stay, new ones are the mean of the rows of the old pieces, in embedding and output layer; text that has
    no new token gets the logits of before. transformers reads the result."""
    from pipeline.data.tokenizer.extension import new_pieces

    folder, said = grown
    assert "20 tokens were added to the tokenizer of" in said
    report = json.loads((folder / "runs/more/tokenizer/current/report.json").read_text())
    assert report["vocab_size"] == 310 and report["before"]["bytes_per_token"] < report["bytes_per_token"]
    assert report["encoder"] == "tiktoken" and report["ids_equal"]["tokenizer.tiktoken"]["equal"] > 30

    made = folder / "runs/more/pretrain/current/model"
    old, new = (AutoTokenizer.from_pretrained(where) for where in (folder / "grown", made))
    before, after = (AutoModelForCausalLM.from_pretrained(where).eval() for where in (folder / "grown", made))
    pieces = new_pieces(old.backend_tokenizer, new.backend_tokenizer)
    assert sorted(pieces) == list(range(290, 310)) and len(new) == after.config.vocab_size == 310
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        rows, old_rows = getattr(after, layer)().weight, getattr(before, layer)().weight
        torch.testing.assert_close(rows[:290], old_rows, atol=1e-6, rtol=0)
        for index, parts in pieces.items():
            torch.testing.assert_close(rows[index], old_rows[parts].mean(0), atol=1e-6, rtol=0)
    ids = old("qqq 17", return_tensors="pt").input_ids
    assert torch.equal(new("qqq 17", return_tensors="pt").input_ids, ids)
    torch.testing.assert_close(after(ids).logits[..., :290], before(ids).logits, atol=1e-4, rtol=0)
    assert (
        len(new.encode("明月光")) < len(old.encode("明月光")) and new.decode(new.encode("ape 明月光")) == "ape 明月光"
    )
    code, text = stage("pretrain", "more.yaml", "pretrain.from_step=1", "output=wrong", cwd=folder)
    assert code == 2 and "Traceback" not in text, text


IN_PARTS = """
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.core import distributed
for name, layout in (("zero", "{zero: 3}"), ("shard", "{shard: full}"), ("pipeline", "{pipeline: 2}")):
    words = [f"output={name}", f"pretrain.parallel={layout}", "pretrain.run.processes=2", "pretrain.micro_batch=2"]
    words += ["pretrain.inputs.tokens=./runs/more/pack/current"]
    words += ["pretrain.inputs.tokenizer=./runs/more/tokenizer/current"]
    run_stage(load("more.yaml", words), "pretrain")
    distributed.barrier()
distributed.shutdown()
"""


@pytest.mark.slow
def test_a_model_that_no_process_reads_completely_goes_on_as_on_one(grown):
    """Losses to 1e-5 and the result, rows of new tokens included, to 1e-6: ZeRO-3, FSDP and a pipeline."""
    folder, _ = grown
    (folder / "parts.py").write_text(IN_PARTS)
    launch(2, "parts.py", cwd=folder)
    expected = load_file(folder / "runs/more/pretrain/current/model/model.safetensors")
    lines = [json.loads(line) for line in (folder / "runs/more/pretrain/current/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    for name in ("zero", "shard", "pipeline"):
        current = folder / name / "more/pretrain/current"
        found = load_file(current / "model/model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0)
        lines = [json.loads(line) for line in (current / "metrics.jsonl").open()]
        assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-5)


# ---- how documents become rows ---------------------------------------------------------------------------------------

ROWS = (
    "    packing: best_fit\n    document_mask: true\n    mixture_changes: [{tokens: 700, mixture: {one: 1, two: 3}}]\n"
    "    fim: {rate: 0.6, sources: [one], prefix: <fill-1>, suffix: <fill-2>, middle: <fill-3>}\n    micro_batch: 4\n"
)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Packed rows, fill-in-the-middle, documents apart and a mixture that changes in the middle of step 3, all at
    once; an uninterrupted run in runs/."""
    folder = tmp_path_factory.mktemp("filled")
    tiny.write_inputs(folder, special=["<fill-1>", "<fill-2>", "<fill-3>"])
    (folder / "recipe.yaml").write_text(tiny.RECIPE + ROWS)
    return folder, succeed("pretrain", "recipe.yaml", cwd=folder, env={"ALMA_ROW_TRACE": str(folder / "rows")})


def test_losses_of_packed_rows_are_those_of_transformers_document_by_document(filled):
    """The first step by hand: each piece of each row alone, through an untrained model, gives the loss that the
    stage logged; so nothing sees its neighbours and every label counts that should."""
    from pipeline.data.tokens.row_sampler import RowSampler
    from pipeline.pretrain import Config
    from pipeline.train.batches import sampler_of

    folder, said = filled
    assert "packing    best fit: one" in said and "mixture    from row 22 (704 tokens) on: one 25%, two 75%" in said
    config = recipe.load(folder / "recipe.yaml")
    block, stage_config = config.model, config.stages["pretrain"]
    assert isinstance(stage_config, Config)
    tokenizer, packed = AutoTokenizer.from_pretrained(folder / "tokenizer"), TokenStore(folder / "tokens")
    rows = sampler_of(stage_config, packed, tokenizer)
    assert isinstance(rows, RowSampler)
    model = build.new(block, tokenizer, 32, 5).eval()
    nats, weight, bare = 0.0, 0, 0
    for index in range(8):
        row = rows.row(index)
        borders = [0, *row.starts.tolist(), 33]
        for begin, end in zip(borders, borders[1:], strict=False):
            ids = torch.from_numpy(row.tokens[begin:end])[None]
            with torch.no_grad():
                logits = model(ids).logits[0].log_softmax(-1)
            for place in range(begin, min(end, 32)):
                if row.label_mask[place]:
                    nats -= logits[place - begin, row.tokens[place + 1]].item()
                    weight += 1
                    bare += int(packed.token_bytes[row.tokens[place + 1]])
    line = json.loads(
        next(text for text in (published(folder) / "metrics.jsonl").read_text().splitlines() if "grad_norm" in text)
    )
    assert line["weight"] == weight < 8 * 32 and line["loss"] == pytest.approx(nats / weight, rel=1e-5)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / bare, rel=1e-5)


def test_held_out_text_is_measured_document_by_document(filled):
    """With document_mask, by transformers on the published model: no held-out document helps the next, as in
    training. To 1e-6, where the same rows read across documents are more than 1e-4 away."""
    folder, _ = filled
    model = AutoModelForCausalLM.from_pretrained(published(folder) / "model").eval()
    size, nats = 0, {"apart": 0.0, "across": 0.0}
    for row in heldout_rows(TokenStore(folder / "tokens"), 32, 10):
        ids, size = torch.from_numpy(row.tokens), size + row.bytes
        places = [0, *((ids[:32] == model.config.eos_token_id).nonzero()[:, 0] + 1).tolist(), 32]
        for kind, borders in (("apart", places), ("across", [0, 32])):
            for begin, end in zip(borders, borders[1:], strict=False):
                if begin < end:
                    with torch.no_grad():
                        logits = model(ids[None, begin:end]).logits[0]
                    nats[kind] += torch.nn.functional.cross_entropy(
                        logits, ids[begin + 1 : end + 1], reduction="sum"
                    ).item()
    found = metrics(folder)["bits_per_byte_after"] * math.log(2) * size
    assert found == pytest.approx(nats["apart"], rel=1e-6) and abs(found / nats["across"] - 1) > 1e-4


def test_packed_rows_survive_kills(filled):
    """Killed twice, and its tables of rows taken away in between: the same bytes."""
    folder, _ = filled
    for fault in ("work:3", "save:2"):
        assert (
            stage(
                "pretrain", "recipe.yaml", "output=killed", "pretrain.save.asynchronous=false", cwd=folder, fault=fault
            )[0]
            == -9
        )
        (table,) = (folder / "killed/tiny/pretrain").glob("*.partial/work/tables/rows-one-32-3.starts.npy")
        table.unlink()
    succeed("pretrain", "recipe.yaml", "output=killed", cwd=folder)
    assert files_of(published(folder, "killed")) == files_of(published(folder))
    expected, found = metrics(folder), metrics(folder, "killed")
    assert {key: found[key] for key in expected if key != "tokens_per_second"} == {
        key: expected[key] for key in expected if key != "tokens_per_second"
    }
    assert expected["tokens_sources"]["one"] + expected["tokens_sources"]["two"] == expected["tokens"] < 6 * 8 * 32


@pytest.mark.parametrize(
    "word, said",
    [
        ("pretrain.packing=concat", "fim: needs packing: best_fit"),
        ("pretrain.fim.prefix=<|fim_prefix|>", "is not a special token of the tokenizer"),
        ("pretrain.fim.sources=[three]", "fim.sources: the tokens have no source 'three'"),
        (
            "pretrain.mixture_changes=[{tokens: 700, mixture: {three: 1}}]",
            "mixture_changes: its text has no source 'three'",
        ),
        ("pretrain.mixture_changes=[{tokens: 700, mixture: {one: 0.5, two: 0.3}}]", "sum to 0.8"),
        (
            "pretrain.mixture_changes=[{tokens: 1536, mixture: {one: 1}}]",
            "is never reached, because this run reads 1,536",
        ),
        (
            "pretrain.mixture_changes=[{tokens: 9, mixture: {one: 1}}, {tokens: 9, mixture: {two: 1}}]",
            "their tokens must increase",
        ),
        ("pretrain.samples={every_steps: 1, prompts: [ape], max_new_tokens: 32}", "more than sequence_length 32"),
    ],
)
def test_rows_that_cannot_be_had_are_refused_before_a_model_is_built(filled, word, said, monkeypatch):
    folder, _ = filled
    code, text = stage("pretrain", "recipe.yaml", "output=wrong", word, cwd=folder)
    if "three" in word and "mixture" in word:
        monkeypatch.chdir(folder)
        graph = nodes(recipe.load("recipe.yaml", [word]))
        with pytest.raises(UserError, match=said):  # so says `alma run` before anything is run
            check(graph["pretrain"], graph)
        said = "has no source 'three'"
    assert code == 2 and said in text and "Traceback" not in text and "model  " not in text, text


def test_rows_are_shown_as_the_model_reads_them(filled, monkeypatch, capsys):
    """`alma inspect tokens`: as JSON exactly what the model is given; as text the documents' words, in their order,
    with what has no label marked."""
    from pipeline import cli
    from pipeline.train.batches import sampler_of, to_batch

    folder, _ = filled
    monkeypatch.chdir(folder)

    def said(*words):
        monkeypatch.setattr("sys.argv", ["alma", "inspect", "tokens", "recipe.yaml", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code, out.out + out.err

    config = recipe.load("recipe.yaml").stages["pretrain"]
    packed, tokenizer = TokenStore("tokens"), AutoTokenizer.from_pretrained("tokenizer")
    rows = sampler_of(config, packed, tokenizer)
    code, text = said("--json", "--row", "19", "--rows", "5")
    lines = [json.loads(line) for line in text.splitlines()]
    batch = to_batch([rows.row(index) for index in range(19, 24)], packed, True)
    assert code == 0 and [line["row"] for line in lines] == [19, 20, 21, 22, 23]
    assert [line["inputs"] for line in lines] == batch["inputs"]["input_ids"].tolist() and [
        line["labels"] for line in lines
    ] == batch["labels"].tolist()
    assert [line["positions"] for line in lines] == batch["inputs"]["position_ids"].tolist()
    code, text = said("--row", "19", "--rows", "5")
    assert (
        code == 0
        and text.count("labels count") == 5
        and "padding" in text
        and all(entry["id"] in text for line in lines for entry in line["documents"])
    )
    assert "⟦<fill-1>⟧" in text and "documents apart" in text
    for word, wanted in (
        ("pretrain.mixture={one: 0}", "no source has a weight above 0"),
        ("wrong", "is not a stage of kind pretrain"),
        ("--length=64", "the rows of pretrain have its sequence_length"),
        ("pretrain.inputs.tokens=./none", "is not a folder"),
    ):
        code, text = said(word)
        assert code == 2 and wanted in text and "Traceback" not in text, text
