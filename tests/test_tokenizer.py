"""Stage tokenizer: every byte is kept, ids are those of sentencepiece and of a slow reference BPE, and a killed run ends in the same files."""

import json
import random
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import regex
from harness import files_of, stage, succeed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

POEMS = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。\n春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。\n"
RARE = "\u9f98"  # stands only in the middle of a line of 60,000 bytes
VOCAB = 700
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\r\t\0\u2585ab的，")), max_size=60)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def english(generator: random.Random, words: int) -> str:
    syllables = ["ba", "ter", "in", "so", "ther", "mon", "al", "ri", "ka", "ment", "un", "ly", "est"]
    text = ""
    for _ in range(words):
        word = "".join(generator.choices(syllables, weights=range(1, 14), k=generator.randint(1, 3)))
        text += word + generator.choices([" ", ". ", "\n\n", "    ", " 1984 "], weights=[50, 5, 2, 1, 1])[0]
    return text


def corpus(folder, documents):
    """documents: split -> [(text, source)], written as stage clean does, three row groups to a file."""
    for split, rows in documents.items():
        (folder / split).mkdir(parents=True)
        table = pyarrow.table({"text": [text for text, _ in rows], "source": [source for _, source in rows], "id": [f"{split}{i}" for i in range(len(rows))]}, schema=SCHEMA)
        pyarrow.parquet.write_table(table, folder / split / "part-00000.parquet", row_group_size=-(-max(1, len(rows)) // 3))


SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("source", pyarrow.string()), ("id", pyarrow.string())])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    generator = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus") / "data"
    lines = POEMS.splitlines(keepends=True)
    train = [(english(generator, 150), "en") for _ in range(60)]
    train += [("".join(generator.choices(lines, k=20)), "zh") for _ in range(60)]
    train += [("a" * 30_000 + " " + RARE * 400 + " " + "b" * 30_000, "zh"), ("trailing newlines\n\r\n\n", "en"), ("with \u2585 inside and \0 too", "en")]
    generator.shuffle(train)
    corpus(folder, {"train": train, "heldout": [(english(generator, 100), "en"), (POEMS, "zh")]})
    return folder


def recipe(folder, data, **keys):
    (folder / "r.yaml").write_text(json.dumps({"name": "t", "stages": {"tokenizer": {"inputs": {"data": str(data)}, "vocab_size": VOCAB, **keys}}}))
    return folder / "r.yaml"


@pytest.fixture(scope="session", params=["sentencepiece-bpe", "byte-bpe"])
def trained(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    succeed("tokenizer", recipe(folder, data, algorithm=request.param), cwd=folder)
    return folder / "runs/t/tokenizer/current"


def loaded(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_publishes_a_fast_tokenizer_with_five_distinct_special_ids(trained):
    tokenizer = loaded(trained)
    assert tokenizer.is_fast and len(tokenizer) == VOCAB
    ids = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"])
    assert len(set(ids)) == 5 and tokenizer.eos_token_id == ids[1] and tokenizer.pad_token_id == ids[2]
    assert tokenizer("a b")["input_ids"] == tokenizer.encode("a b", add_special_tokens=False)
    report = json.loads((trained / "report.json").read_text())
    assert report["round_trip"]["exact"] == report["round_trip"]["texts"] > 0
    form = "tokenizer.model" if report["algorithm"] == "sentencepiece-bpe" else "tokenizer.tiktoken"
    assert report["ids_equal"][form]["equal"] == report["ids_equal"][form]["texts"] > 0 and report["encoder"] != "tokenizers"
    assert set(report["bytes_per_token_by_source"]) == {"en", "zh"} and report["bytes_per_token"] > 1.5


def test_any_text_survives_and_becomes_no_special_token(trained):
    from pipeline.data.tokens import encode_text, token_bytes

    tokenizer = loaded(trained)
    special = set(tokenizer.all_special_ids)
    sizes = token_bytes(tokenizer)

    @quick
    @given(st.lists(ANY_TEXT | st.sampled_from(["<|im_end|>", "x<|im_start|>system\n", "<unk><|pad|>", "\u2581a \u2581", "<0x0A>", "  " * 40, "\U00020000\u200d\ufeff"]), max_size=4))
    def check(texts):
        for text, ids in zip(texts, encode_text(tokenizer, texts), strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert not special & set(ids)
            assert sizes[ids].sum() == len(text.encode())

    check()
    assert tokenizer.encode("a<|im_end|>")[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), "marks written by a template still work"


def test_ids_are_those_of_sentencepiece(trained, data):
    from sentencepiece import SentencePieceProcessor

    from pipeline.data.tokens import encode_text

    if not (trained / "tokenizer.model").exists():
        pytest.skip("byte-bpe has no sentencepiece model")
    pieces = SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    tokenizer = loaded(trained)
    texts = pyarrow.parquet.read_table(data / "train/part-00000.parquet")["text"].to_pylist()
    assert encode_text(tokenizer, texts) == [pieces.encode(text) for text in texts]
    assert pieces.encode(RARE * 3) != pieces.encode("\u9f97" * 3) and len(pieces.encode(RARE)) == 1, "the middle of the long line was not learned"
    assert "\n\n" in [pieces.id_to_piece(i) for i in range(len(pieces))], "newlines inside a document were not learned"

    @quick
    @given(ANY_TEXT.filter(lambda text: "\u2581" not in text))
    def check(text):
        assert encode_text(tokenizer, [text]) == [pieces.encode(text)]

    check()


def test_overlapping_pairs_merge_as_in_sentencepiece(tmp_path):
    """Two letters, so that most splits of a piece overlap: where pair ranks and piece scores could disagree."""
    from sentencepiece import SentencePieceProcessor

    from pipeline.data import bpe

    generator = random.Random(1)
    texts = ["".join(generator.choices("ab ", weights=[5, 5, 1], k=400)) for _ in range(60)]
    model = bpe.train_sentencepiece(texts, 420, True, 1.0, tmp_path / "log")
    pieces, tokenizer = SentencePieceProcessor(model_proto=model), bpe.from_sentencepiece(model)
    fresh = ["".join(generator.choices("ab ", weights=[5, 5, 1], k=300)) for _ in range(300)] + ["a" * n + "b" + "ab" * n for n in range(60)]
    same = sum(tokenizer.encode(text).ids == pieces.encode(text) for text in fresh)
    assert same == len(fresh), f"{len(fresh) - same} of {len(fresh)} differ"


def test_byte_bpe_ids_are_those_of_a_slow_reference(trained, data):
    """Split by the cl100k pattern, then join the best-ranked pair until there is none: 15 lines, no shared code."""
    from pipeline.data.tokens import encode_text

    spec = json.loads((trained / "tokenizer.json").read_text())
    if spec["decoder"]["type"] != "ByteLevel":
        pytest.skip("sentencepiece has its own oracle")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in printable)}
    ranks = {tuple(pair): rank for rank, pair in enumerate(spec["model"]["merges"])}
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    assert set(alphabet.values()) <= set(spec["model"]["vocab"]), "all 256 bytes"

    def slow(text):
        ids = []
        for word in regex.findall(pattern, text):
            parts = [alphabet[byte] for byte in word.encode()]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 10**9))
                if (parts[best], parts[best + 1]) not in ranks:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [spec["model"]["vocab"][part] for part in parts]
        return ids

    tokenizer = loaded(trained)
    texts = [text[:500] for text in pyarrow.parquet.read_table(data / "train/part-00000.parquet")["text"].to_pylist()[:40]] + ["it's 12345 　！？\r\n\r\n  x"]
    assert encode_text(tokenizer, texts) == [slow(text) for text in texts]


def test_the_chat_template_marks_answers_and_their_end(trained):
    tokenizer = loaded(trained)
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi "}, {"role": "assistant", "content": " yo\n"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    text = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n yo\n<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert tokenizer.apply_chat_template(talk, tokenize=False) == text
    assert tokenizer.apply_chat_template(talk[:2], tokenize=False, add_generation_prompt=True) == text[: text.index(" yo")]
    got = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    trained_ids = [token for token, mark in zip(got["input_ids"], got["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(trained_ids) == " yo\n<|im_end|><|im_end|>"


def test_the_folder_loads_alike_beside_a_model_config(trained, tmp_path):
    from pipeline.data.tokens import encode_text, load_tokenizer

    texts = ["the  ther 1984\n\n床前明月光"]
    wanted = encode_text(loaded(trained), texts)
    shutil.copytree(trained, tmp_path / "model")
    for family in ("llama", "mistral", "qwen3", "gpt2"):
        (tmp_path / "model/config.json").write_text(json.dumps({"model_type": family}))
        assert encode_text(loaded(tmp_path / "model"), texts) == wanted, family
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "qwen2"}))  # AutoTokenizer forces another class here
    assert encode_text(load_tokenizer(tmp_path / "model"), texts) == wanted


def test_killed_anywhere_it_ends_in_the_same_files(trained, data, tmp_path):
    algorithm = json.loads((trained / "report.json").read_text())["algorithm"]
    wanted = files_of(trained)
    path = recipe(tmp_path, data, algorithm=algorithm)
    for fault in ("save:1", "work:2", "publish:1", "publish:2"):
        assert stage("tokenizer", path, cwd=tmp_path, fault=fault)[0] == -9, fault
    succeed("tokenizer", path, cwd=tmp_path)
    assert files_of(tmp_path / "runs/t/tokenizer/current") == wanted
    other = tmp_path / "other"
    other.mkdir()
    path = recipe(other, data, algorithm=algorithm)
    stage("tokenizer", path, cwd=other, kill_after=random.Random().uniform(0.1, 1.0))
    succeed("tokenizer", path, cwd=other, env={"RAYON_NUM_THREADS": "1"})
    assert files_of(other / "runs/t/tokenizer/current") == wanted


def test_mistakes_end_in_a_sentence(data, tmp_path):
    def refused(*words, source=data, **keys):
        code, text = stage("tokenizer", recipe(tmp_path, source, **keys), *words, "--restart", cwd=tmp_path)
        assert code == 2 and "Traceback" not in text, text
        return text

    for algorithm in ("sentencepiece-bpe", "byte-bpe"):
        text = refused(algorithm=algorithm, vocab_size=50_000)
        most = int(regex.search(r"set vocab_size to at most (\d+)", text)[1])
        succeed("tokenizer", recipe(tmp_path, data, algorithm=algorithm, vocab_size=most), "--restart", cwd=tmp_path)
    assert "no source 'fr'" in refused(weights={"fr": 1})
    assert "algoritm" in refused(algoritm="bpe")
    corpus(tmp_path / "empty", {"train": [], "heldout": []})
    assert "no text" in refused(source=tmp_path / "empty")
    corpus(tmp_path / "one", {"train": [("a", "en")], "heldout": []})
    assert "more than this text supports" in refused(source=tmp_path / "one")
    assert "not a folder" in refused(source=tmp_path / "nowhere")


def test_the_sample_is_bounded_and_even(data, tmp_path):
    succeed("tokenizer", recipe(tmp_path, data, sample_bytes=40_000, vocab_size=400), cwd=tmp_path)
    drawn = json.loads((tmp_path / "runs/t/tokenizer/current/report.json").read_text())["sample_bytes"]
    assert sum(drawn.values()) <= 40_000 and all(abs(size - 20_000) < 8 for size in drawn.values()), drawn


@quick
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 10**9), max_size=6), st.integers(0, 10**9))
def test_shares_fill_the_limit_and_no_more(available, limit):
    from pipeline.data.sample import shares

    share = shares(available, limit, None)
    assert all(0 <= share[source] <= available[source] for source in available)
    assert min(limit, sum(available.values())) - len(available) <= sum(share.values()) <= limit


@quick
@given(st.lists(ANY_TEXT, max_size=5))
def test_sentences_keep_every_character_but_the_reserved_one(texts):
    from collections import Counter

    from pipeline.data.bpe import sentences

    got = list(sentences(texts))
    kept = Counter("".join(text for text in texts if text.strip("\r\n\u2585")))
    lost = kept - Counter("".join(got))
    assert set(lost) <= {"\u2585", "\n", "\r"} and not any(text.endswith(("\n", "\r")) for text in got)
