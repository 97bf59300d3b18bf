"""Token files of other tools as sources of stage pack, written here by writers of their own: nothing lost, the same
in every format, and refused where index and data do not fit."""

import json
import struct

import numpy as np
import pytest
from harness import files_of, stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import recipe
from pipeline.core.errors import UserError
from pipeline.core.graph import check, nodes
from pipeline.core.status import examine
from pipeline.data.tokens import import_shards
from pipeline.data.tokens.import_shards import Shards
from pipeline.data.tokens.store import TokenStore

quick = settings(max_examples=60, deadline=None, derandomize=True)
CODES = {"uint16": 8, "int32": 4, "int64": 5}


def write_megatron(path, documents, dtype="uint16", sequences=1):
    """As Megatron's IndexedDatasetBuilder: each document in `sequences` parts."""
    lengths, borders = [], [0]
    for ids in documents:
        step = -(-len(ids) // sequences) or 1
        lengths += [len(ids[at : at + step]) for at in range(0, len(ids), step)] or [0]
        borders.append(len(lengths))
    size = np.dtype(dtype).itemsize
    offsets = [sum(lengths[:place]) * size for place in range(len(lengths))]
    path.with_suffix(".bin").write_bytes(np.array(sum(documents, []), dtype).tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(borders))
    path.with_suffix(".idx").write_bytes(
        head
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(offsets)}q", *offsets)
        + struct.pack(f"<{len(borders)}q", *borders)
    )
    return path.with_suffix(".bin")


def write_datatrove(path, documents, letter="H"):
    path = path.with_suffix(".ds")
    ends = np.cumsum([len(ids) for ids in documents]).astype(int)
    path.write_bytes(b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in documents))
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return path


def plain(documents, eos, indexed=True):
    """The documents as expected, without their ends: cut after each eos, without empty ones. Without an index a document
    ends only at an eos."""
    result = []
    for ids in documents if indexed else [sum(documents, [])]:
        part = []
        for token in ids:
            if token == eos:
                result.append(part)
                part = []
            else:
                part.append(token)
        result.append(part)
    return [part for part in result if part]


@quick
@given(st.data())
def test_any_ranges_give_every_document_once(tmp_path_factory, data):
    """Documents with and without ends, with ends inside, and empty ones; cut into ranges of any size: all of them, in
    order, in each format."""
    folder = tmp_path_factory.mktemp("any")
    documents = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=12))
    width, eos = data.draw(st.integers(1, 40)), 1
    np.save(folder / "n.npy", np.array(sum(documents, []), np.int32))
    (folder / "raw.tok").write_bytes(np.array(sum(documents, []), np.uint16).tobytes())
    files = [
        (
            write_megatron(
                folder / "m", documents, data.draw(st.sampled_from(sorted(CODES))), data.draw(st.integers(1, 3))
            ),
            {},
            True,
        ),
        (write_datatrove(folder / "d", documents, data.draw(st.sampled_from("HI"))), {}, True),
        (folder / "n.npy", {}, False),
        (folder / "raw.tok", {"dtype": "uint16"}, False),
    ]
    for path, options, indexed in files:
        shard = import_shards.open_shard(path, Shards(path=str(path), **options))
        result, empty = [], 0
        for begin in range(0, len(shard.tokens), width):
            first, ends = import_shards.documents_in(shard, begin, begin + width, eos)
            for end in ends.tolist():
                ids = shard.tokens[first:end].tolist()
                result.append(ids[:-1] if ids[-1:] == [eos] else ids)
                empty, first = empty + (not ids), end
        assert [ids for ids in result if ids] == plain(documents, eos, indexed), path
        if indexed and len(shard.tokens):
            assert empty == sum(not ids for ids in documents)


# ---- through the stage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Text packed by the stage itself, and its tokens as other tools would have written them."""
    import tiny

    folder = tmp_path_factory.mktemp("shards")
    tiny.write_inputs(folder)
    store, heldout = TokenStore(folder / "tokens"), TokenStore(folder / "tokens", "heldout")
    documents = {}
    for source in store.sources:
        ends = store.documents(source)[:, 0]
        documents[source] = [ids.tolist() for ids in np.split(store.read(source, 0, int(ends[-1])), ends[:-1])]
    (folder / "shards").mkdir()
    cut = len(documents["one"]) // 2
    write_megatron(folder / "shards/a", documents["one"][:cut], "int32")
    # without end-of-document tokens
    write_megatron(folder / "shards/b", [ids[:-1] for ids in documents["one"][cut:]], "uint16", 2)
    write_datatrove(folder / "shards/c", documents["two"])
    np.save(folder / "shards/d.npy", np.array(sum(documents["two"], []), np.uint16))
    (folder / "shards/e.raw").write_bytes(np.array(sum(documents["two"], []), np.uint32).tobytes())
    return folder, documents, store, heldout


SHARDS = {
    "megatron": {"path": "shards/*.bin", "holdout": 0},
    "datatrove": {"path": ["shards/c.ds"], "holdout": 0},
    "numpy": {"path": "shards/d.npy", "holdout": 0},
    "raw": {"path": "shards/e.raw", "dtype": "uint32", "holdout": 0.2},
}


def recipe_of(folder, shards, inputs=None, name="r.yaml"):
    (folder / name).write_text(
        json.dumps(
            {
                "name": "t",
                "stages": {"pack": {"inputs": {"tokenizer": "./tokenizer", **(inputs or {})}, "shards": shards}},
            }
        )
    )
    return name


def test_each_format_becomes_what_the_stage_packs_itself(home):
    folder, documents, original, _ = home
    output = succeed("pack", recipe_of(folder, SHARDS), "pack.workers=1", cwd=folder)
    imported = TokenStore(folder / "runs/t/pack/current")
    assert imported.sources == ["datatrove", "megatron", "numpy", "raw"] and imported.dtype == np.uint16
    for source, same in (("megatron", "one"), ("datatrove", "two"), ("numpy", "two")):
        total = original.num_tokens(same)
        assert (
            imported.num_tokens(source) == total
            and (imported.read(source, 0, total) == original.read(same, 0, total)).all()
        )
        assert (imported.documents(source) == original.documents(same)).all(), (
            "bytes too, since these tokens spell their text"
        )
    assert (
        f"{len(documents['one']) - len(documents['one']) // 2} documents of shards had no end-of-document token"
        in output
    )
    assert [piece.id for piece in imported.document_spans("megatron", 0, len(documents["one"][0]) + 1)] == [
        "a.bin@0",
        f"a.bin@{len(documents['one'][0])}",
    ]
    heldout = TokenStore(folder / "runs/t/pack/current", "heldout")
    assert heldout.sources == ["raw"] and heldout.num_documents("raw") + imported.num_documents("raw") == len(
        documents["two"]
    )
    assert 0 < heldout.num_documents("raw") < 0.5 * len(documents["two"])
    parts = [store.read("raw", 0, store.num_tokens("raw")).tolist() for store in (imported, heldout)]
    ends = [store.documents("raw")[:, 0].tolist() for store in (imported, heldout)]
    split = [
        tuple(part[a:b]) for part, end in zip(parts, ends, strict=True) for a, b in zip([0, *end], end, strict=False)
    ]
    assert sorted(split) == sorted(map(tuple, documents["two"]))
    metrics = json.loads((folder / "runs/t/pack/current/manifest.json").read_text())["metrics"]
    assert metrics["sources"]["megatron"]["documents"] == len(documents["one"])


def test_the_same_bytes_for_any_number_of_workers_after_kills_and_in_another_folder(home, tmp_path, monkeypatch):
    folder, *_ = home
    name = recipe_of(folder, SHARDS)
    succeed("pack", name, "pack.workers=1", "output=whole", cwd=folder)
    for fault in ("save:2", "work:3", "publish:1"):
        assert stage("pack", name, "pack.workers=1", "output=killed", cwd=folder, fault=fault)[0] == -9
    succeed("pack", name, "pack.workers=2", "output=killed", cwd=folder)
    expected = files_of(folder / "whole/t/pack/current")
    assert files_of(folder / "killed/t/pack/current") == expected
    (folder / "elsewhere").mkdir()
    for path in (folder / "shards").iterdir():
        (folder / "elsewhere" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(folder)
    moved = json.loads(json.dumps(SHARDS).replace("shards/", "elsewhere/"))
    nodes = [
        examine(recipe.load(recipe_of(folder, shards, name=f"{i}.yaml"), ["output=whole"]))["pack"]
        for i, shards in enumerate((moved, {**moved, "raw": SHARDS["raw"] | {"holdout": 0.3}}))
    ]
    assert [node.state for node in nodes] == ["up to date", "stale"], (
        "the folder of the files is not part of the identity, holdout is"
    )
    data = {"data": str(folder / "clean")}
    succeed("pack", recipe_of(folder, {"more": SHARDS["numpy"]}, data), "pack.workers=1", "output=both", cwd=folder)
    assert TokenStore(folder / "both/t/pack/current").sources == ["more", "one", "two"]
    code, output = stage(
        "pack",
        recipe_of(folder, {"two": SHARDS["numpy"]}, data),
        "pack.workers=1",
        "output=both",
        "--restart",
        cwd=folder,
    )
    assert code == 2 and "shards.two: the documents of inputs.data have a source of this name" in output


def test_small_units_join_to_the_same_tokens(home, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from pipeline import pack
    from pipeline.core import artifact

    folder, *_ = home
    monkeypatch.chdir(folder)
    results = []
    for number, size in enumerate((2**23, 100)):
        monkeypatch.setattr(import_shards, "UNIT_TOKENS", size)
        (tmp_path / str(number)).mkdir()
        config = pack.Config(workers=1, shards=SHARDS)
        pack.run(
            config,
            {"tokenizer": artifact.external("tokenizer", folder / "tokenizer")},
            SimpleNamespace(path=tmp_path / str(number), note_time=lambda: None),
        )
        results.append(files_of(tmp_path / str(number)))
    assert results[0] == results[1]


# ---- what is refused -------------------------------------------------------------------------------------------------


def _edit(path, change):
    path.write_bytes(change(path.read_bytes()))


BROKEN = [
    ("m.bin", lambda f: _edit(f / "m.bin", lambda raw: raw[:-4]), "its index ends at token 12, the file has 10"),
    ("m.bin", lambda f: _edit(f / "m.bin", lambda raw: raw[:-1]), "not a multiple of 2, the size of uint16"),
    ("m.bin", lambda f: _edit(f / "m.idx", lambda raw: raw[:-8]), "it was truncated or overwritten"),
    ("m.bin", lambda f: _edit(f / "m.idx", lambda raw: b"TNTIDX\x00\x00" + raw[8:]), "is not an index of Megatron's"),
    (
        "m.bin",
        lambda f: _edit(f / "m.idx", lambda raw: raw[:17] + b"\x06" + raw[18:]),
        "are not token ids of version 1",
    ),
    (
        "m.bin",
        lambda f: _edit(f / "m.idx", lambda raw: raw[:34] + struct.pack("<i", 9) + raw[38:]),
        "the index is damaged",
    ),
    (
        "m.bin",
        lambda f: _edit(f / "m.idx", lambda raw: raw[:-8] + struct.pack("<q", 7)),
        "its document borders go from 0 to 7; they must ascend from 0 to 3",
    ),
    ("d.ds", lambda f: _edit(f / "d.ds", lambda raw: raw[:-2]), "neither 2 nor 4 bytes per token"),
    ("d.ds", lambda f: _edit(f / "d.ds.index", lambda raw: raw[8:16] + raw[:8] + raw[16:]), "do not ascend"),
    ("d.ds", lambda f: (f / "d.ds.index").unlink(), "d.ds.index: is missing"),
    ("d.ds", lambda f: (f / "d.ds.loss").write_bytes(b"1"), "loss masks are not supported"),
    ("n.npy", lambda f: np.save(f / "n.npy", np.zeros((2, 3), np.uint16)), "expected one row of token ids"),
    ("n.npy", lambda f: np.save(f / "n.npy", np.zeros(3)), "expected one row of token ids"),
    (
        "n.npy",
        lambda f: np.save(f / "n.npy", np.array([{}], object), allow_pickle=True),
        "cannot be read as a numpy array|expected one row",
    ),
    ("n.npy", lambda f: _edit(f / "n.npy", lambda raw: raw[:-2]), "cannot be read as a numpy array"),
    ("m.idx", lambda f: None, "has no numpy header"),
]


@pytest.mark.parametrize("place", range(len(BROKEN)))
def test_files_that_do_not_fit_together_are_refused(tmp_path, place):
    name, change, message = BROKEN[place]
    documents = [[5, 6, 1], [7, 1], [5] * 7]
    write_megatron(tmp_path / "m", documents)
    write_datatrove(tmp_path / "d", documents)
    np.save(tmp_path / "n.npy", np.array(sum(documents, []), np.uint16))
    import_shards.open_shard(tmp_path / name, Shards(path=name)) if name != "m.idx" else None
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        import_shards.open_shard(tmp_path / name, Shards(path=name))


def test_tokens_of_another_tokenizer_and_missing_files_are_reported(home):
    folder, _, store, _ = home
    np.save(folder / "shards/other.npy", np.array([5, 1, 700], np.int32))
    np.save(folder / "shards/none.npy", np.full(3, store.eos_id, np.int32))
    for shards, message in (
        ({"x": {"path": "shards/other.npy"}}, "token 2 is 700, beyond the vocabulary of 290"),
        ({"x": {"path": "shards/none.npy"}}, "none of the documents for training has tokens"),
        ({"x": {"path": "nowhere/*.bin"}}, "shards.x.path: no file matches nowhere/*.bin"),
        ({"x": {"path": ["shards/d.npy", "shards/d.npy"]}}, "names 1 file twice"),
        ({"x": {"path": "shards/c.ds", "dtype": "uint16"}}, "remove dtype"),
        ({}, "needs the input 'data'"),
    ):
        code, text = stage("pack", recipe_of(folder, shards), "pack.workers=1", "output=wrong", "--restart", cwd=folder)
        assert code == 2 and message in text and "Traceback" not in text, (shards, text)


def test_pretraining_on_shards_alone(home):
    """No clean stage: its mixture is checked against the names of the shards, and heldout-out rows come from them."""
    import tiny

    folder, *_ = home
    text = tiny.RECIPE.replace(
        "  pretrain:\n    inputs: {tokens: ./tokens, tokenizer: ./tokenizer}",
        "  pack: {inputs: {tokenizer: ./tokenizer}, shards: {mine: {path: shards/e.raw, dtype: uint32, holdout:"
        " 0.3}}}\n  pretrain:\n    inputs: {tokenizer: ./tokenizer}",
    )
    (folder / "chain.yaml").write_text(text.replace("{one: 2, two: 1}", "{mine: 1}"))
    succeed("pack", "chain.yaml", "pack.workers=1", "output=shards-only", cwd=folder)
    assert "6 steps" in succeed("pretrain", "chain.yaml", "output=shards-only", cwd=folder)
    graph = nodes(recipe.load(folder / "chain.yaml", ["pretrain.mixture={other: 1}"]))
    with pytest.raises(UserError, match="its text has no source 'other'; it has mine"):
        check(graph["pretrain"], graph)
