"""Stage pack, the token store and the sampler: nothing lost, nothing twice, and the same for any number of workers,
ranks and kills."""

import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from harness import byte_level, files_of, stage, succeed

from pipeline.core.errors import UserError

WORDS = "the of and 白日 依山尽 黄河 入海流 <|im_end|> 1984 tokenizer \U0001f468\u200d\U0001f469 \n\n".split(" ")


def text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def write(path, rows, row_group_size=25):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "text": [row[0] for row in rows],
        "source": [row[1] for row in rows],
        "id": [f"{path.stem}-{i}" for i in range(len(rows))],
    }
    pyarrow.parquet.write_table(
        pyarrow.table(columns, schema=pyarrow.schema([(name, pyarrow.string()) for name in columns])),
        path,
        row_group_size=row_group_size,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """data/ as stage clean writes it, tokenizer/ as stage tokenizer does, and their packed output."""
    from pipeline.data.tokenizer.tokenizer_folder import publish

    folder, generator = tmp_path_factory.mktemp("pack"), random.Random(0)
    for part in range(2):
        write(
            folder / f"data/train/part-{part:05d}.parquet",
            [(text(generator, generator.randint(1, 60)), generator.choice(["wiki/en", "诗"])) for _ in range(60)],
        )
    write(
        folder / "data/heldout/part-00000.parquet",
        [(text(generator, 40), generator.choice(["wiki/en", "诗"])) for _ in range(20)],
    )
    publish(byte_level([text(generator, 2000)], 300), folder / "tokenizer")
    recipe(folder)
    succeed("pack", folder / "r.yaml", "pack.workers=1", cwd=folder)
    return folder


def recipe(folder, home=None):
    inputs = {"data": str((home or folder) / "data"), "tokenizer": str((home or folder) / "tokenizer")}
    (folder / "r.yaml").write_text(json.dumps({"name": "t", "stages": {"pack": {"inputs": inputs}}}))
    return folder / "r.yaml"


def store(home, split="train"):
    from pipeline.data.tokens.store import TokenStore

    return TokenStore(home / "runs/t/pack/current", split)


def rows_of(home, split):
    return [
        row
        for path in sorted((home / "data" / split).glob("*.parquet"))
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def test_every_document_is_in_its_source_in_order_and_ends_with_eos(home):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "tokenizer")
    for split in ("train", "heldout"):
        packed, rows = store(home, split), rows_of(home, split)
        assert packed.sources == ["wiki/en", "诗"] and packed.dtype == np.uint16
        for source in packed.sources:
            expected = [row["text"] for row in rows if row["source"] == source]
            ends = packed.documents(source)
            assert ends[-1, 0] == packed.num_tokens(source) and len(ends) == packed.num_documents(source) == len(
                expected
            )
            assert packed.num_bytes(source) == sum(len(text.encode()) for text in expected)
            begin = 0
            for (end, size), document in zip(ends, expected, strict=True):
                ids = packed.read(source, begin, end - begin).tolist()
                assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
                assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == document and size == len(
                    document.encode()
                )
                assert ids[:-1] == tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                begin = end
    with pytest.raises(IndexError):
        packed.read("诗", packed.num_tokens("诗") - 1, 2)


def test_every_token_leads_to_its_document(home):
    """Ranges of all sizes, also across shards: each token's document, by id, and its place in that document."""
    packed, generator = store(home), random.Random(3)
    for source in packed.sources:
        ids = [row["id"] for row in rows_of(home, "train") if row["source"] == source]
        ends = packed.documents(source)[:, 0]
        owner = np.repeat(np.arange(len(ids)), np.diff(np.concatenate([[0], ends])))
        total = packed.num_tokens(source)
        for start, length in [
            (0, total),
            (0, 1),
            (total - 1, 1),
            *((at := generator.randrange(total), generator.randint(1, min(90, total - at))) for _ in range(40)),
        ]:
            spans = packed.document_spans(source, start, length)
            assert [id_ for span in spans for id_ in [span.id] * span.length] == [
                ids[number] for number in owner[start : start + length]
            ]
            assert [span.start for span in spans] == np.cumsum([0, *(span.length for span in spans[:-1])]).tolist()
            assert all(
                span.offset == start + span.start - (ends[ids.index(span.id) - 1] if ids.index(span.id) else 0)
                for span in spans
            )


def test_the_same_bytes_for_any_number_of_workers_and_after_any_kill(home, tmp_path):
    expected = files_of(home / "runs/t/pack/current")
    path = recipe(tmp_path, home)
    for fault in ("save:2", "work:2", "publish:1", "publish:2"):
        assert stage("pack", path, "pack.workers=1", cwd=tmp_path, fault=fault)[0] == -9, fault
    succeed("pack", path, "pack.workers=1", cwd=tmp_path)
    assert files_of(tmp_path / "runs/t/pack/current") == expected
    (tmp_path / "two").mkdir()
    path = recipe(tmp_path / "two", home)
    code, output = stage("pack", path, "pack.workers=2", cwd=tmp_path / "two", fault="save:2")
    assert code == 2 and "resumes here" in output, "the death of a worker is reported"
    stage("pack", path, "pack.workers=1", cwd=tmp_path / "two", kill_after=random.Random().uniform(0.05, 0.5))
    succeed("pack", path, "pack.workers=2", cwd=tmp_path / "two")
    assert files_of(tmp_path / "two/runs/t/pack/current") == expected


def test_shards_end_with_units_and_are_read_across(home, monkeypatch):
    from pipeline import pack
    from pipeline.data.tokens import join_units

    parts = [("unit", 0, {"tokens": n}) for n in (5, 3, 9, 1, 1)]
    monkeypatch.setattr(join_units, "SHARD_TOKENS", 8)
    assert [[part[2]["tokens"] for part in shard] for shard in join_units.grouped(parts)] == [[5, 3], [9], [1, 1]]

    def rerun(folder):
        folder.mkdir()
        inputs = {name: SimpleNamespace(path=home / name) for name in ("data", "tokenizer")}
        pack.run(pack.Config(workers=1), inputs, SimpleNamespace(path=folder, note_time=lambda: None))
        from pipeline.data.tokens.store import TokenStore

        return TokenStore(folder)

    monkeypatch.setattr(join_units, "SHARD_TOKENS", 500)
    many, one = rerun(home / "many"), store(home)
    assert len(list((home / "many/train").iterdir())) > 8
    for source in one.sources:
        total = one.num_tokens(source)
        assert (many.documents(source) == one.documents(source)).all()
        for start, length in [(0, total), (1, total - 2), (total // 2, 7), (total, 0)]:
            assert (many.read(source, start, length) == one.read(source, start, length)).all()
            assert many.document_spans(source, start, length) == one.document_spans(source, start, length)


def test_bad_documents_are_listed_with_their_place(home, tmp_path):
    path = tmp_path / "data/train/part-00000.parquet"
    write(path, [("good", "a"), (None, "a"), ("", "a"), ("no source", None), ("also good", "a")], row_group_size=2)
    table = pyarrow.parquet.read_table(path)
    raw = pyarrow.array([b"good", None, b"", b"x", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(table.set_column(0, "text", raw), path, row_group_size=2)
    shutil.copytree(home / "tokenizer", tmp_path / "tokenizer")
    succeed("pack", recipe(tmp_path), "pack.workers=1", cwd=tmp_path)
    bad = [json.loads(line) for line in (tmp_path / "runs/t/pack/current/bad.jsonl").read_text().splitlines()]
    assert [(line["row_group"], line["row"], line["reason"]) for line in bad] == [
        (0, 1, "no text"),
        (1, 0, "no text"),
        (1, 1, "no source"),
        (2, 0, "not UTF-8 at byte 0"),
    ]
    assert store(tmp_path).num_documents("a") == 1


def test_mistakes_are_reported(home, tmp_path):
    def refused():
        code, output = stage("pack", recipe(tmp_path), "pack.workers=1", "--restart", cwd=tmp_path)
        assert code == 2 and "Traceback" not in output, output
        return output

    shutil.copytree(home / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/note.txt").write_text("x")
    assert "has no train/part-*.parquet" in refused()
    (tmp_path / "data/train/part-00000.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read as parquet" in refused()
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "data/train/part-00000.parquet")
    assert "has the columns {'content': 'string'}" in refused()
    write(tmp_path / "data/train/part-00000.parquet", [])
    assert "nothing to pack" in refused()
    spec = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    token = max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"][token] += 7
    spec["model"]["merges"] = []
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(spec))
    assert "some ids have no token" in refused() and "adopt:" in refused()
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(spec)[:5000])
    assert "tokenizer.json: cannot be read" in refused()
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    assert "no tokenizer.json" in refused()


def test_damage_is_detected_on_opening(home, tmp_path):
    from pipeline.data.tokens.store import TokenStore, misfit

    def damaged(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(home / "runs/t/pack/current", folder)
        change(folder)
        with pytest.raises(UserError) as error:
            TokenStore(folder)
        return str(error.value)

    tokens, documents = "train/wiki%2Fen-00000.tokens.npy", "train/wiki%2Fen-00000.documents.npy"
    assert "damaged" in damaged(lambda f: (f / tokens).write_bytes((f / tokens).read_bytes()[:-2]))
    assert "is missing" in damaged(lambda f: (f / tokens).unlink())
    assert "says" in damaged(lambda f: np.save(f / tokens, np.zeros(3, np.uint16)))
    assert "does not end where" in damaged(lambda f: np.save(f / documents, np.load(f / documents) - 1))
    assert "ids end" in damaged(
        lambda f: np.save(
            f / documents.replace("documents", "id_ends"), np.load(f / documents.replace("documents", "id_ends")) - 1
        )
    )
    # What opening does not read is checked for folders that stage pack did not write.
    folder = tmp_path / "order"
    shutil.copytree(home / "runs/t/pack/current", folder)
    swapped = np.load(folder / documents)
    swapped[[3, 4]] = swapped[[4, 3]]
    np.save(folder / documents, swapped)
    assert misfit(
        home / "runs/t/pack/current"
    ) is None and "document 4 of source wiki/en (train) ends at token" in misfit(folder)
    assert "older version" in damaged(
        lambda f: (f / "index.json").write_text((f / "index.json").read_text().replace("id_bytes", "other"))
    )
    assert "index.json: damaged" in damaged(lambda f: (f / "index.json").write_text("{"))
    assert "not the output of stage pack" in damaged(lambda f: (f / "index.json").unlink())


# ---- held-out rows ---------------------------------------------------------------------------------------------------


def test_heldout_rows_count_each_label_and_its_bytes_once(home):
    from transformers import AutoTokenizer

    from pipeline.data.tokens.heldout_rows import heldout_rows

    tokenizer, packed = AutoTokenizer.from_pretrained(home / "tokenizer"), store(home, "heldout")
    for length, most in ((32, 5), (17, 10**6)):
        rows = heldout_rows(packed, length, most)
        assert len(rows) == min(most, sum(packed.num_tokens(source) // length for source in packed.sources))
        assert all(row.tokens.shape == (length + 1,) and row.tokens.dtype == np.int64 for row in rows)
        for source in packed.sources:
            source_rows = [row for row in rows if row.source == source]
            labels = np.concatenate([row.tokens[1:] for row in source_rows])
            assert (labels == packed.read(source, 0, len(labels))).all() and source_rows[0].tokens[0] == packed.eos_id
            assert all(a.tokens[-1] == b.tokens[0] for a, b in zip(source_rows, source_rows[1:], strict=False)), (
                "the context of a row's first label is the label before"
            )
            begins = {int(end) for end in packed.documents(source)[:, 0]} | {0}
            assert all(  # slot s of row k holds token k * length + s - 1
                {number * length + slot - 1 for slot in row.starts.tolist()}
                == {place for place in begins if number * length <= place < (number + 1) * length}
                for number, row in enumerate(source_rows)
            ), "a document begins where one has ended"
            spelled = re.sub(
                "\ufffd+$", "", tokenizer.decode([i for i in labels if i != packed.eos_id], skip_special_tokens=False)
            )
            assert 0 <= sum(row.bytes for row in source_rows) - len(spelled.encode()) <= 3, (
                "a cut character has up to three bytes that do not decode"
            )
    with pytest.raises(UserError, match="shorten sequence_length"):
        heldout_rows(packed, 10**6, 5)


def test_bytes_of_whole_documents_are_exact_under_a_tokenizer_that_is_not(home, tmp_path):
    """A tokenizer that puts a space before every text: its tokens spell one byte more than each document has."""
    from pipeline.data.tokens.heldout_rows import heldout_rows

    shutil.copytree(home / "tokenizer", tmp_path / "tokenizer")
    spec = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Prepend", "prepend": " "}
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(spec))
    for split in ("train", "heldout"):
        write(tmp_path / f"data/{split}/part-00000.parquet", [("abc " * n, "a") for n in range(1, 9)])
    output = succeed("pack", recipe(tmp_path), "pack.workers=1", cwd=tmp_path)
    assert "16 documents do not spell" in output
    packed = store(tmp_path, "heldout")
    divisor = next(n for n in range(8, 200) if packed.num_tokens("a") % n == 0)
    assert sum(row.bytes for row in heldout_rows(packed, divisor, 10**6)) == packed.num_bytes("a")


def test_document_starts_of_a_row(home):
    from pipeline.data.tokens.row_sampler import RowSampler

    packed = store(home)
    sampler = RowSampler(packed, 64, None, 3)
    for index in range(50):
        row = sampler.row(index)
        begins = packed.documents(row.source)[:, 0] - row.index * 64
        assert row.starts.tolist() == [begin for begin in begins if 0 < begin <= 64]


# ---- rows without a pretraining stage --------------------------------------------------------------------------------


def test_rows_of_a_recipe_that_ends_with_pack_are_shown(home, monkeypatch, capsys):
    from pipeline import cli
    from pipeline.data.tokens.row_sampler import RowSampler

    monkeypatch.chdir(home)

    def inspect(*words):
        monkeypatch.setattr("sys.argv", ["alma", "inspect", "tokens", "r.yaml", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return ended.value.code, out.out + out.err

    packed = store(home)
    rows = RowSampler(packed, 40, None, 0)
    code, text = inspect("--json", "--length", "40", "--row", "3")
    lines = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [line["row"] for line in lines] == [3, 4, 5]
    for line in lines:
        tokens = rows.row(line["row"]).tokens.tolist()
        assert line["inputs"] == tokens[:-1] and line["labels"] == tokens[1:]
    code, text = inspect()
    assert code == 0 and "rows of 512 (concat)" in text and text.count("512 of 512 labels count") == 3
    code, text = inspect("pack", "--length", "100000000")
    assert code == 2 and "give at most" in text
    code, text = inspect("clean")
    assert code == 2 and "is not a stage of kind pretrain or pack; these are: pack" in text
