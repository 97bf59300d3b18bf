"""Stage tokenizer: every byte is kept, ids are those of sentencepiece and of a slow reference BPE, and a killed run
ends in the same files."""

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
from sentencepiece_model import prefixed

from pipeline.core.errors import UserError
from pipeline.core.precheck import checked

POEMS = (
    "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
    "\n春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。\n"
)
RARE = "\u9f98"  # only in the middle of a line of 60,000 bytes
VOCAB = 700
ANY_TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\r\t\0\u2585ab的，")), max_size=60
)
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


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
        table = pyarrow.table(
            {
                "text": [text for text, _ in rows],
                "source": [source for _, source in rows],
                "id": [f"{split}{i}" for i in range(len(rows))],
            },
            schema=SCHEMA,
        )
        pyarrow.parquet.write_table(
            table, folder / split / "part-00000.parquet", row_group_size=-(-max(1, len(rows)) // 3)
        )


SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("source", pyarrow.string()), ("id", pyarrow.string())])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    generator = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus") / "data"
    lines = POEMS.splitlines(keepends=True)
    train = [(english(generator, 150), "en") for _ in range(60)]
    train += [("".join(generator.choices(lines, k=20)), "zh") for _ in range(60)]
    train += [
        ("a" * 30_000 + " " + RARE * 400 + " " + "b" * 30_000, "zh"),
        ("trailing newlines\n\r\n\n", "en"),
        ("with \u2585 inside and \0 too", "en"),
    ]
    generator.shuffle(train)
    corpus(folder, {"train": train, "heldout": [(english(generator, 100), "en"), (POEMS, "zh")]})
    return folder


def recipe(folder, data, **keys):
    (folder / "r.yaml").write_text(
        json.dumps({"name": "t", "stages": {"tokenizer": {"inputs": {"data": str(data)}, "vocab_size": VOCAB, **keys}}})
    )
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
    assert (
        report["ids_equal"][form]["equal"] == report["ids_equal"][form]["texts"] > 0
        and report["encoder"] != "tokenizers"
    )
    assert set(report["bytes_per_token_by_source"]) == {"en", "zh"} and report["bytes_per_token"] > 1.5


def test_any_text_survives_and_becomes_no_special_token(trained):
    from pipeline.data.tokenizer.fast_tokenizer import encode_text, token_bytes

    tokenizer = loaded(trained)
    special = set(tokenizer.all_special_ids)
    sizes = token_bytes(tokenizer)

    @quick
    @given(
        st.lists(
            ANY_TEXT
            | st.sampled_from(
                [
                    "<|im_end|>",
                    "x<|im_start|>system\n",
                    "<unk><|pad|>",
                    "\u2581a \u2581",
                    "<0x0A>",
                    "  " * 40,
                    "\U00020000\u200d\ufeff",
                ]
            ),
            max_size=4,
        )
    )
    def check(texts):
        for text, ids in zip(texts, encode_text(tokenizer, texts), strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert not special & set(ids)
            assert sizes[ids].sum() == len(text.encode())

    check()
    assert tokenizer.encode("a<|im_end|>")[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), (
        "marks written by a template still work"
    )


def test_ids_are_those_of_sentencepiece(trained, data):
    from sentencepiece import SentencePieceProcessor

    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    if not (trained / "tokenizer.model").exists():
        pytest.skip("byte-bpe has no sentencepiece model")
    pieces = SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    tokenizer = loaded(trained)
    texts = pyarrow.parquet.read_table(data / "train/part-00000.parquet")["text"].to_pylist()
    assert encode_text(tokenizer, texts) == [pieces.encode(text) for text in texts]
    assert pieces.encode(RARE * 3) != pieces.encode("\u9f97" * 3) and len(pieces.encode(RARE)) == 1, (
        "the middle of the long line was not learned"
    )
    assert "\n\n" in [pieces.id_to_piece(i) for i in range(len(pieces))], "newlines inside a document were not learned"

    @quick
    @given(ANY_TEXT.filter(lambda text: "\u2581" not in text))
    def check(text):
        assert encode_text(tokenizer, [text]) == [pieces.encode(text)]

    check()


def test_overlapping_pairs_merge_as_in_sentencepiece(tmp_path):
    """Two letters, so that most splits of a piece overlap: where pair ranks and piece scores could disagree."""
    from sentencepiece import SentencePieceProcessor

    from pipeline.data.tokenizer import spm_model, spm_trainer

    generator = random.Random(1)
    texts = ["".join(generator.choices("ab ", weights=[5, 5, 1], k=400)) for _ in range(60)]
    model = spm_trainer.train_sentencepiece(texts, 420, True, 1.0, tmp_path / "log")
    pieces, tokenizer = SentencePieceProcessor(model_proto=model), spm_model.to_fast_tokenizer(model)
    fresh = ["".join(generator.choices("ab ", weights=[5, 5, 1], k=300)) for _ in range(300)] + [
        "a" * n + "b" + "ab" * n for n in range(60)
    ]
    same = sum(tokenizer.encode(text).ids == pieces.encode(text) for text in fresh)
    assert same == len(fresh), f"{len(fresh) - same} of {len(fresh)} differ"


def test_byte_bpe_ids_are_those_of_a_slow_reference(trained, data):
    """Split by the cl100k pattern, then join the best-ranked pair until there is none: 15 lines, no shared code."""
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    spec = json.loads((trained / "tokenizer.json").read_text())
    if spec["decoder"]["type"] != "ByteLevel":
        pytest.skip("sentencepiece has its own oracle")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in printable)
    }
    ranks = {tuple(pair): rank for rank, pair in enumerate(spec["model"]["merges"])}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
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
    texts = [
        text[:500] for text in pyarrow.parquet.read_table(data / "train/part-00000.parquet")["text"].to_pylist()[:40]
    ] + ["it's 12345 　！？\r\n\r\n  x"]
    assert encode_text(tokenizer, texts) == [slow(text) for text in texts]


def test_the_chat_template_marks_answers_and_their_end(trained):
    tokenizer = loaded(trained)
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi "},
        {"role": "assistant", "content": " yo\n"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": ""},
    ]
    text = (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n"
        " yo\n<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(talk, tokenize=False) == text
    assert (
        tokenizer.apply_chat_template(talk[:2], tokenize=False, add_generation_prompt=True) == text[: text.index(" yo")]
    )
    encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    masked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    trained_ids = [token for token, mark in masked if mark]
    assert tokenizer.decode(trained_ids) == " yo\n<|im_end|><|im_end|>"


# Texts on which another class of transformers gives other ids: not NFC, full width, digits, leading space, and marks.
REVEALING = [
    "the cafe\u0301 \u00e9 1984 12345",
    " \uff26\uff35 床前明月光\n\n",
    "<|im_end|> it's <unk>",
    "가각 ﬁ  ther",
]


def test_every_stage_reads_the_same_ids_whatever_family_the_model_is_of(trained, tmp_path):
    """Correctness 1: pack (encoder), pretrain, assess and export (load_tokenizer), and the finetuning stages
    (tokenizer_of) beside the config.json of every family that recipes or document masks name."""
    same_ids_in_every_family(trained, tmp_path / "model")


def same_ids_in_every_family(folder, copy):
    from pipeline.data.tokenizer.encode import encoder
    from pipeline.data.tokenizer.fast_tokenizer import encode_text, load_tokenizer
    from pipeline.models.families import supporting
    from pipeline.train.finetune import tokenizer_of

    expected = [ids.tolist() for ids in encoder(folder)(REVEALING)]
    assert expected == encode_text(load_tokenizer(folder), REVEALING)
    shutil.copytree(folder, copy)
    vocabulary = load_tokenizer(folder).get_vocab()
    masked = supporting("document_mask")
    assert "qwen2" in masked
    for family in (*masked, "openai-gpt", "opt", "bloom", "mamba", "mamba2", "rwkv"):
        (copy / "config.json").write_text(json.dumps({"model_type": family}))
        for read in (load_tokenizer, lambda place: tokenizer_of(place, 16)):
            tokenizer = read(copy)
            assert encode_text(tokenizer, REVEALING) == expected, family
            assert tokenizer.get_vocab() == vocabulary, family


def test_the_longest_token_is_bounded(trained, data, tmp_path):
    """The corpus has words of 30,000 equal letters."""
    if (trained / "tokenizer.model").exists():
        pytest.skip("sentencepiece bounds characters")
    succeed("tokenizer", recipe(tmp_path, data, algorithm="byte-bpe", max_token_bytes=6), cwd=tmp_path)
    for folder, longest in ((trained, 128), (tmp_path / "runs/t/tokenizer/current", 6)):
        vocabulary = loaded(folder).get_vocab()
        assert max(len(token) for token in vocabulary if not token.startswith("<|")) == longest


def test_killed_anywhere_it_ends_in_the_same_files(trained, data, tmp_path):
    algorithm = json.loads((trained / "report.json").read_text())["algorithm"]
    expected = files_of(trained)
    path = recipe(tmp_path, data, algorithm=algorithm)
    for fault in ("save:1", "work:2", "publish:1", "publish:2"):
        assert stage("tokenizer", path, cwd=tmp_path, fault=fault)[0] == -9, fault
    succeed("tokenizer", path, cwd=tmp_path)
    assert files_of(tmp_path / "runs/t/tokenizer/current") == expected
    other = tmp_path / "other"
    other.mkdir()
    path = recipe(other, data, algorithm=algorithm)
    stage("tokenizer", path, cwd=other, kill_after=random.Random().uniform(0.1, 1.0))
    succeed("tokenizer", path, cwd=other, env={"RAYON_NUM_THREADS": "1"})
    assert files_of(other / "runs/t/tokenizer/current") == expected


def test_mistakes_are_reported(data, tmp_path):
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
    assert "belongs to algorithm byte-bpe" in refused(max_token_bytes=64)
    assert "split_digits: False has no effect with adopt" in refused(adopt="x", vocab_size=None, split_digits=False)
    assert "character_coverage: 0.99 belongs to algorithm sentencepiece" in refused(
        algorithm="byte-bpe", character_coverage=0.99
    )
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
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 10**9), max_size=6), st.integers(0, 10**9)
)
def test_shares_fill_the_limit_and_no_more(available, limit):
    from pipeline.data.tokenizer.sample import shares

    share = shares(available, limit, None)
    assert all(0 <= share[source] <= available[source] for source in available)
    assert min(limit, sum(available.values())) - len(available) <= sum(share.values()) <= limit


@quick
@given(st.lists(ANY_TEXT, max_size=5))
def test_sentences_keep_every_character_but_the_reserved_one(texts):
    from collections import Counter

    from pipeline.data.tokenizer.spm_trainer import sentences

    result = list(sentences(texts))
    expected = Counter("".join(text for text in texts if text.strip("\r\n\u2585")))
    lost = expected - Counter("".join(result))
    assert set(lost) <= {"\u2585", "\n", "\r"} and not any(text.endswith(("\n", "\r")) for text in result)


# ---- unigram, policies, balance --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    generator = random.Random(3)
    folder = tmp_path_factory.mktemp("small") / "data"
    train = [(english(generator, 120), "en") for _ in range(40)] + [
        ("".join(generator.choices(POEMS.splitlines(keepends=True), k=20)), "zh") for _ in range(20)
    ]
    corpus(folder, {"train": train, "heldout": [(english(generator, 100), "en"), (POEMS, "zh")]})
    return folder


def test_unigram_keeps_every_text_and_agrees_with_sentencepiece(small, tmp_path):
    from sentencepiece import SentencePieceProcessor

    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    succeed("tokenizer", recipe(tmp_path, small, algorithm="sentencepiece-unigram", vocab_size=450), cwd=tmp_path)
    folder = tmp_path / "runs/t/tokenizer/current"
    report = json.loads((folder / "report.json").read_text())
    assert (
        report["round_trip"]["exact"] == report["round_trip"]["texts"]
        and report["ids_equal"]["tokenizer.model"]["texts"] > 60
    )
    tokenizer, pieces = loaded(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = pyarrow.parquet.read_table(small / "train/part-00000.parquet")["text"].to_pylist()
    texts += ["<|im_end|><0x0A> <unk>", "\U00020000 \0\r\n"]
    encoded = encode_text(tokenizer, texts)
    assert encoded == [pieces.encode(text) for text in texts]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in encoded] == texts and not set(
        tokenizer.all_special_ids
    ) & {token for ids in encoded for token in ids}
    same_ids_in_every_family(folder, tmp_path / "model")


@quick
@given(st.lists(ANY_TEXT, max_size=4), st.integers(1, 9))
def test_runs_are_cut_without_losing_a_character(texts, longest):
    from pipeline.data.tokenizer.spm_trainer import sentences

    whole, cut = "".join(sentences(texts)), list(sentences(texts, longest))
    assert sorted("".join(cut)) == sorted(whole) or set(whole) - set("".join(cut)) <= {"\r", "\n"}
    assert all(len(run.lstrip("\r\n")) <= longest for sentence in cut for run in sentence.split(" ")), cut


def test_unigram_on_a_long_run_costs_as_much_as_on_lines(tmp_path):
    """A document of one run without a space, of random letters and of one letter: CPU seconds beside those of the same
    text with spaces. Uncut they take 5 and 47 times as long."""
    import time

    from pipeline.data.tokenizer import spm_trainer

    generator = random.Random(5)
    letters = "".join(generator.choices("abcdefghij", k=30_000))
    common = [english(generator, 100) for _ in range(20)]

    def seconds(name, text):
        begun = time.process_time()
        spm_trainer.train_sentencepiece([*common, text], 420, True, 1.0, tmp_path / name, "unigram")
        return time.process_time() - begun

    spaced = seconds("spaced", " ".join(letters[at : at + 8] for at in range(0, len(letters), 8)))
    assert max(seconds("letters", letters), seconds("one", "a" * 30_000)) < 2 * spaced + 0.5


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_trainers_log_is_shown_while_it_trains(kind, tmp_path, monkeypatch, capsys):
    from pipeline.core import tracking
    from pipeline.data.tokenizer import spm_trainer

    monkeypatch.setattr(tracking, "PLAIN_SECONDS", 0.001)
    generator = random.Random(6)
    texts = [english(generator, 100) for _ in range(300)]
    spm_trainer.train_sentencepiece(texts, 500, True, 1.0, tmp_path / "log", kind)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("tokenizer: sentencepiece, ") for line in lines), lines
    shown = {line.partition("so far: ")[2] for line in lines}
    log = (tmp_path / "log").read_text()
    assert all(message in log for message in shown)
    expected = "EM sub_iter=" if kind == "unigram" else "Tokenizing input sentences"
    assert any(expected in message for message in shown), shown


@pytest.mark.parametrize("algorithm", ["sentencepiece-bpe", "byte-bpe"])
def test_special_and_reserved_tokens_and_the_white_space_policy(algorithm, small, tmp_path):
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    keys = {"special_tokens": ["<|tool|>"], "reserved_tokens": 3, "merge_whitespace": False, "vocab_size": 480}
    succeed("tokenizer", recipe(tmp_path, small, algorithm=algorithm, **keys), cwd=tmp_path)
    tokenizer = loaded(tmp_path / "runs/t/tokenizer/current")
    names = ["<|tool|>", "<|reserved_0|>", "<|reserved_2|>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert len(tokenizer) == 480 and len(set(ids)) == 3 and set(ids) <= set(tokenizer.all_special_ids)
    assert [tokenizer.encode(name) for name in names] == [[index] for index in ids]
    [raw] = encode_text(tokenizer, ["<|tool|><|reserved_0|>"])
    assert not set(raw) & set(tokenizer.all_special_ids) and tokenizer.decode(raw) == "<|tool|><|reserved_0|>"
    text = {index: tokenizer.decode([index]) for index in range(480) if index not in tokenizer.all_special_ids}
    assert not [
        piece
        for piece in text.values()
        if len(piece) > 1 and not piece.strip(" " if algorithm == "sentencepiece-bpe" else None)
    ], "a run of white space became a token"
    code, output = stage(
        "tokenizer", recipe(tmp_path, small, special_tokens=["<|eos|>"], vocab_size=480), "--restart", cwd=tmp_path
    )
    assert code == 2 and "special_tokens" in output


def test_languages_are_balanced_by_temperature(tmp_path):
    """Three languages' worth of text in two sources; the share of a language of n bytes is as n ** (1 / T), and
    inside it as the sources have it."""
    zh = "今天的天气很好，我们一起去公园散步吧。" * 4
    en = "The weather is fine today and we are going for a walk in the park. " * 4
    rows = (
        [(en + str(i), "web") for i in range(160)]
        + [(zh + str(i), "web") for i in range(10)]
        + [(zh + str(i), "books") for i in range(10)]
    )
    corpus(tmp_path / "data", {"train": rows, "heldout": []})
    size = {
        code: sum(len(text.encode()) for text, _ in rows if text.startswith(begin))
        for code, begin in (("en", "The"), ("zh", "今"))
    }
    for temperature in (1, 2, None):
        folder = tmp_path / str(temperature)
        folder.mkdir()
        keys = {} if temperature is None else {"temperature": temperature}
        succeed(
            "tokenizer",
            recipe(
                folder,
                tmp_path / "data",
                balance=["language"],
                sample_bytes=6000,
                vocab_size=300,
                algorithm="byte-bpe",
                **keys,
            ),
            cwd=folder,
        )
        report = json.loads((folder / "runs/t/tokenizer/current/report.json").read_text())
        weight = {code: number ** (1 / temperature if temperature else 0) for code, number in size.items()}
        for code, share in report["sample_bytes_by_language"].items():
            assert abs(share / 6000 - weight[code] / sum(weight.values())) < 0.01, (temperature, report)


# ---- adopting --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=["sentencepiece-bpe", "byte-bpe"])
def plain(request, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"plain-{request.param}")
    succeed("tokenizer", recipe(folder, small, algorithm=request.param, vocab_size=450), cwd=folder)
    return folder / "runs/t/tokenizer/current"


def adopted(folder, data, path, **keys):
    folder.mkdir()
    (folder / "r.yaml").write_text(
        json.dumps({"name": "t", "stages": {"tokenizer": {"inputs": {"data": str(data)}, "adopt": str(path), **keys}}})
    )
    return stage("tokenizer", folder / "r.yaml", cwd=folder), folder / "runs/t/tokenizer/current"


def test_a_folder_a_model_and_a_tiktoken_file_are_adopted_with_the_same_ids(plain, small, tmp_path):
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    texts = [
        "the  ther 1984\n\n床前明月光 it's",
        *(row for row in pyarrow.parquet.read_table(small / "heldout/part-00000.parquet")["text"].to_pylist()),
    ]
    expected = encode_text(loaded(plain), texts)
    result, folder = adopted(tmp_path / "folder", small, plain)
    assert result[0] == 0, result[1]
    assert encode_text(loaded(folder), texts) == expected and loaded(folder).get_vocab() == loaded(plain).get_vocab()
    file = next(path for name in ("tokenizer.model", "tokenizer.tiktoken") if (path := plain / name).exists())
    pattern = (
        json.loads((plain / "tokenizer.json").read_text())["pre_tokenizer"]
        .get("pretokenizers", [{}])[0]
        .get("pattern", {})
        .get("Regex")
    )
    result, folder = adopted(
        tmp_path / "file", small, file, **({"pattern": pattern} if file.suffix == ".tiktoken" else {})
    )
    assert result[0] == 0, result[1]
    assert encode_text(loaded(folder), texts) == expected
    tokenizer = loaded(folder)
    assert (
        len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3 and tokenizer.chat_template
    )
    report = json.loads((folder / "report.json").read_text())
    assert report["round_trip"]["exact"] == report["round_trip"]["texts"]


def test_tokens_are_added_to_an_adopted_tokenizer(plain, small, data, tmp_path):
    """Byte-level: old ids stay, the report compares, a killed run ends with the same files, and the result is adopted
    and extended again. sentencepiece's is refused before anything runs."""
    from pipeline.data.tokenizer import extension
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    (code, output), folder = adopted(
        tmp_path / "more", data, plain, add_tokens=20, reserved_tokens=1, weights={"zh": 1}
    )
    if (plain / "tokenizer.model").is_file():
        assert code == 2 and "is not byte-level" in output and "tokens can be added to byte-level BPE" in output, output
        command = recipe(tmp_path, data, adopt=str(plain), add_tokens=50, vocab_size=None)
        with pytest.raises(UserError, match="add_tokens: .* is not byte-level"):
            checked(command, sources=True)
        return
    assert code == 0 and "20 tokens more than the 450 of" in output and " -> " in output.splitlines()[-1], output
    report = json.loads((folder / "report.json").read_text())
    before, old, new = report["before"], loaded(plain), loaded(folder)
    for key in ("bytes_per_token_by_source", "characters_per_token_by_source"):
        assert before[key]["zh"] < report[key]["zh"] and before[key]["en"] <= report[key]["en"]
    assert (
        before["bytes_per_token_by_source"] == measured(old, data) and before["texts_with_the_same_ids"]["texts"] == 2
    )
    assert len(new) == 471 and new.convert_tokens_to_ids("<|reserved_0|>") == 470
    assert new.get_vocab().items() > old.get_vocab().items() and new.chat_template == old.chat_template
    pieces = extension.new_pieces(old.backend_tokenizer, new.backend_tokenizer)
    ids, old_ids = encode_text(new, [POEMS]), encode_text(old, [POEMS])
    assert extension.expanded(ids[0], pieces) == old_ids[0] and len(ids[0]) < len(old_ids[0])

    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(tmp_path / "more/r.yaml", killed / "r.yaml")
    for fault in ("save:1", "work:1"):
        assert stage("tokenizer", killed / "r.yaml", cwd=killed, fault=fault)[0] == -9
    succeed("tokenizer", killed / "r.yaml", cwd=killed)
    assert files_of(killed / "runs/t/tokenizer/current") == files_of(folder)
    (code, output), again = adopted(tmp_path / "again", data, folder, add_tokens=3, max_token_bytes=40)
    assert code == 0 and len(loaded(again)) == 474, output
    for keys, said in (
        ({"add_tokens": 5000}, "pairs of tokens left to merge"),
        ({"max_token_bytes": 9}, "to add_tokens"),
    ):
        (code, output), _ = adopted(tmp_path / str(keys), small, folder, **keys)
        assert code == 2 and said in output and "Traceback" not in output, output


def measured(tokenizer, data) -> dict:
    """Bytes per token of the held-out text by source, by hand."""
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    rows = pyarrow.parquet.read_table(data / "heldout/part-00000.parquet").to_pylist()
    rates = {}
    for source in ("en", "zh"):
        texts = [row["text"] for row in rows if row["source"] == source]
        num_tokens = sum(map(len, encode_text(tokenizer, texts)))
        rates[source] = round(sum(len(text.encode()) for text in texts) / num_tokens, 4)
    return rates


SPACED = [
    "a",
    " a",
    "  the ther\n\n x ",
    "床前明月光",
    "[INST] hi [/INST]",
    "<s></s><unk><0x0A>",
    "",
    " ",
    "\n",
    "\u2585\0",
]


@pytest.mark.parametrize("kind, name", [("bpe", "x.model"), ("bpe", "tokenizer.model.v3"), ("unigram", "pieces")])
def test_a_model_with_the_default_prefix_is_adopted_with_its_own_ids(kind, name, small, tmp_path):
    """Correctness 27: the oracle is sentencepiece with its prefix; decoding removes the prefix. A file is recognized by its content."""
    from sentencepiece import SentencePieceProcessor

    from pipeline.data.tokenizer.encode import encoder
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    texts = pyarrow.parquet.read_table(small / "train/part-00000.parquet")["text"].to_pylist()
    (tmp_path / name).write_bytes(prefixed(texts, kind))
    (code, output), folder = adopted(tmp_path / "run", small, tmp_path / name)
    assert code == 0 and "(add_dummy_prefix)" in output and "such as [REF], are special tokens" in output, output
    report = json.loads((folder / "report.json").read_text())
    for count in (report["round_trip"], report["ids_equal"]["tokenizer.model"]):
        assert count.get("exact", count.get("equal")) == count["texts"] > 60
    assert report["encoder"] == ("sentencepiece" if kind == "bpe" else "tokenizers")
    pieces, tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), loaded(folder)
    expected = [pieces.encode(text) for text in SPACED]
    assert encode_text(tokenizer, SPACED) == expected == [ids.tolist() for ids in encoder(folder)(SPACED)]
    assert [tokenizer.decode(ids) for ids in expected] == SPACED
    [marked] = encode_text(tokenizer, ["see [REF]"])
    marks = tokenizer.convert_tokens_to_ids(["[INST]", "[REF]"])
    assert not set(marked) & set(marks) and tokenizer.decode(marked) == "see [REF]"
    assert all(tokenizer.added_tokens_decoder[index].special for index in marks)
    # it has no pad token, and none is added, because this tokenizer's model would lack a row for it
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == pieces.eos_id()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is True, "for llama.cpp's converter"


def test_user_defined_pieces_that_are_not_marks_are_recognized_in_text(small, tmp_path):
    """As sentencepiece does."""
    from sentencepiece import SentencePieceProcessor

    from pipeline.data.tokenizer import spm_model, spm_trainer
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    texts = pyarrow.parquet.read_table(small / "train/part-00000.parquet")["text"].to_pylist()
    model = spm_trainer.train_sentencepiece(texts, 440, True, 0.999, tmp_path / "log")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece, text in zip(list(proto.pieces)[300:302], ("qqq", "\u2581\u2581zz"), strict=True):
        piece.piece, piece.type, piece.score = text, piece.USER_DEFINED, 0
    model = proto.SerializeToString()
    spaced = ["xqqqqq y", "a  zz", "qqq", "  zzqqq  ", *texts[:20]]
    peer = SentencePieceProcessor(model_proto=model)
    assert encode_text(spm_model.to_fast_tokenizer(model), spaced) == [peer.encode(text) for text in spaced]


@pytest.mark.parametrize("name", ["tokenizer.model", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4", "vocab.tiktoken"])
def test_a_tiktoken_file_is_recognized_by_its_content(name, tmp_path):
    """Correctness 27: Llama 3's tokenizer.model, and the files of tiktoken's cache, alone and in a folder."""
    from pipeline.core.errors import UserError
    from pipeline.data.tokenizer import byte_bpe, import_tokenizer
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    folder = tmp_path / "llama3"
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    (folder / name).write_bytes(byte_bpe.dump(BYTES | {b"th": 256, b"the": 257}))
    for place in (folder / name, folder):
        imported = import_tokenizer.load(str(place), None)
        assert imported.algorithm == "adopted tiktoken" and encode_text(imported.backend, ["the"]) == [[257]]
        assert folder / name in import_tokenizer.files(str(place))
    (folder / "another").write_bytes(byte_bpe.dump(BYTES))
    with pytest.raises(UserError, match="2 sentencepiece or tiktoken files"):
        import_tokenizer.load(str(folder), None)
    (folder / "prose").write_text("Some text that is no vocabulary.\n")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        import_tokenizer.load(str(folder / "prose"), None)


def test_a_pattern_without_effect_is_refused(plain, tmp_path):
    from pipeline.core.errors import UserError
    from pipeline.data.tokenizer import import_tokenizer

    with pytest.raises(UserError, match="pattern: .* remove `pattern`"):
        import_tokenizer.load(str(plain), "a+")


@pytest.mark.slow
def test_published_tokenizers_are_adopted_with_their_own_ids(tmp_path):
    """Mistral's models v1 to v7, Llama 3's tokenizer.model, a file of tiktoken's cache, and Qwen's,
    compared with sentencepiece and tiktoken."""
    import subprocess
    import sys

    import tiktoken
    from sentencepiece import SentencePieceProcessor
    from tiktoken.load import load_tiktoken_bpe

    from pipeline.data.tokenizer.fast_tokenizer import encode_text
    from pipeline.data.tokenizer.pretokenize import pattern
    from pipeline.data.tokenizer.verify_tokenizer import HARD_TEXTS
    from pipeline.tokenizer import Config, adopt

    packages = ["mistral-common==1.13.1", "llama-models==0.3.0", "litellm==1.109.1", "dashscope==2.0.2"]
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-compile",
        "--target",
        str(tmp_path / "packages"),
        *packages,
    ]
    install = subprocess.run(words, capture_output=True, text=True, timeout=600)
    if install.returncode:
        pytest.skip(f"cannot install {', '.join(packages)}: {install.stderr.strip().splitlines()[-1:]}")
    home, texts = tmp_path / "packages", [*SPACED, *HARD_TEXTS, "it's 12345 <|begin_of_text|>"]
    mistral = sorted((home / "mistral_common/data").glob("*.model*"))
    cached = home / "litellm/litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    tiktoken_files = [home / "llama_models/llama3/tokenizer.model", cached, home / "dashscope/resources/qwen.tiktoken"]
    assert len(mistral) == 5
    for number, path in enumerate([*mistral, *tiktoken_files]):
        folder = tmp_path / f"adopted{number}"
        adopt(Config(adopt=str(path)), folder)
        if path in mistral:
            peer = SentencePieceProcessor(model_file=str(path)).encode
        else:
            ranks = load_tiktoken_bpe(str(path))
            engine = tiktoken.Encoding("peer", pat_str=pattern(False), mergeable_ranks=ranks, special_tokens={})
            peer = engine.encode_ordinary
        same = [text for text in texts if "\u2581" not in text]
        assert encode_text(loaded(folder), same) == [peer(text) for text in same], path


def test_folders_whose_files_contradict_each_other_are_refused(plain, small, tmp_path):
    def broken(name, action):
        folder = tmp_path / f"{name}-source"
        shutil.copytree(plain, folder)
        (folder / "manifest.json").unlink()
        action(folder)
        (code, output), _ = adopted(tmp_path / name, small, folder)
        assert code == 2 and "Traceback" not in output, output
        return output

    def config(folder, **keys):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    assert "is not a token of tokenizer.json" in broken("eos", lambda folder: config(folder, eos_token="<|nothing|>"))
    assert "with its special token 'e'" in broken("ordinary", lambda folder: config(folder, eos_token="e"))
    assert "says that the model has 10 tokens" in broken(
        "size", lambda folder: (folder / "config.json").write_text('{"vocab_size": 10}')
    )
    assert "cannot be read" in broken("json", lambda folder: (folder / "tokenizer.json").write_text("{"))
    if (plain / "tokenizer.tiktoken").exists():
        lines = (plain / "tokenizer.tiktoken").read_text().splitlines()
        assert "do not have the same tokens" in broken(
            "ranks", lambda folder: (folder / "tokenizer.tiktoken").write_text("\n".join(lines[:-1]))
        )
        (tmp_path / "short.tiktoken").write_text("\n".join(lines[1:]))
        (code, output), _ = adopted(tmp_path / "short", small, tmp_path / "short.tiktoken")
        assert code == 2 and "no token for byte" in output
    else:
        assert "in tokenizer.model" in broken(
            "model", lambda folder: (folder / "tokenizer.model").write_bytes(_other_model(folder))
        )
    (code, output), _ = adopted(tmp_path / "none", small, tmp_path / "nowhere")
    assert code == 2 and "nowhere does not exist" in output


def _other_model(folder):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    proto.pieces[300].piece = "zzz"
    return proto.SerializeToString()


def test_a_lossy_sentencepiece_model_is_refused(small, tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    lines = [
        line
        for text in pyarrow.parquet.read_table(small / "train/part-00000.parquet")["text"].to_pylist()
        for line in text.splitlines()
    ]
    # the defaults: NFKC, spaces joined, no bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=200, model_type="bpe", minloglevel=2
    )
    (tmp_path / "default.model").write_bytes(model.getvalue())
    (code, output), _ = adopted(tmp_path / "run", small, tmp_path / "default.model")
    assert code == 2 and "normalization nmt_nfkc" in output, output


def test_the_report_of_inspect(plain, small, monkeypatch):
    from typer.testing import CliRunner

    from pipeline.cli import app

    folder = plain.parents[3]
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(
        app, ["inspect", "tokenizer", str(folder / "r.yaml"), "--compare", "", "--json"], catch_exceptions=False
    )
    report = json.loads(result.stdout)
    tokenizer = loaded(plain)
    texts = {
        split: pyarrow.parquet.read_table(small / split / "part-00000.parquet").to_pylist()
        for split in ("train", "heldout")
    }
    assert report["round_trip"] == {"texts": sum(map(len, texts.values())), "exact": sum(map(len, texts.values()))}
    for source, row in report["by_source"].items():
        chosen = [entry["text"] for entry in texts["heldout"] if entry["source"] == source]
        count = sum(len(tokenizer.encode(text)) for text in chosen)
        assert row["bytes_per_token"] == round(sum(len(text.encode()) for text in chosen) / count, 4) and row[
            "characters_per_token"
        ] == round(sum(map(len, chosen)) / count, 4)
    seen = {token for rows in texts.values() for entry in rows for token in tokenizer.encode(entry["text"])}
    assert report["unused"]["tokens"] == report["unused"]["of"] - len(seen)
    curve = [row["bytes_per_token"] for row in report["curve"]]
    assert curve == sorted(curve)
    total = [
        sum(len(entry["text"].encode()) for entry in texts["heldout"]),
        sum(len(tokenizer.encode(entry["text"])) for entry in texts["heldout"]),
    ]
    assert curve[-1] == round(total[0] / total[1], 4), "the whole vocabulary is the last point"
    assert len(report["splits"]["1234567890"]) == 10, "digits are split one by one"
    assert (
        "round trip"
        in CliRunner()
        .invoke(app, ["inspect", "tokenizer", str(folder / "r.yaml"), "--compare", ""], catch_exceptions=False)
        .stdout
    )


BYTES = {bytes([byte]): byte for byte in range(256)}


def test_ids_without_a_token_are_filled_in_a_tiktoken_file(small, tmp_path):
    """As in p50k_base.tiktoken, which lacks 50256. The oracle is tiktoken with the same ranks."""
    import tiktoken

    from pipeline.data.tokenizer import byte_bpe
    from pipeline.data.tokenizer.fast_tokenizer import encode_text
    from pipeline.data.tokenizer.pretokenize import pattern

    tokens = BYTES | {b"th": 256, b"er": 258, b"the": 259, "月".encode(): 263}
    (tmp_path / "holes.tiktoken").write_bytes(byte_bpe.dump(tokens))
    (code, output), folder = adopted(tmp_path / "run", small, tmp_path / "holes.tiktoken")
    assert code == 0 and "4 ids below 263 have no token (257, 260, 261, ...)" in output, output
    tokenizer = loaded(folder)
    ids = tokenizer.get_vocab()
    assert sorted(ids.values()) == list(range(len(tokenizer))) and tokenizer.convert_tokens_to_ids("<|eos|>") >= 264
    assert {ids[f"<|unused {index}|>"] for index in (257, 260, 261, 262)} == {257, 260, 261, 262}
    peer = tiktoken.Encoding("peer", pat_str=pattern(False), mergeable_ranks=tokens, special_tokens={})
    texts = ["the other there 床前明月光", "<|unused 257|> and <|unused_257|>", " <|unused", *map(chr, range(300))]
    encoded = encode_text(tokenizer, texts)
    assert encoded == [peer.encode_ordinary(text) for text in texts]
    assert not set(tokenizer.all_special_ids) & {index for ids in encoded for index in ids}
    assert [tokenizer.decode(ids) for ids in encoded] == texts


def holed(folder, last):
    """A byte-level folder whose end-of-text token has an id behind a gap, as cl100k's has, which `tokenizers` itself
    reads as the next free one."""
    from pipeline.data.tokenizer import byte_bpe

    folder.mkdir()
    byte_bpe.build(BYTES | {b"th": 256}, [(b"t", b"h")], r"\s+|\S+", []).save(str(folder / "tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": last, "content": "<|end|>", **plain}]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "added_tokens_decoder": {str(last): {"content": "<|end|>", **plain}}})
    )
    return folder


def test_ids_without_a_token_are_filled_in_a_folder_and_declared_ids_are_kept(small, tmp_path):
    from pipeline.data.tokenizer.fast_tokenizer import encode_text, token_bytes

    source = holed(tmp_path / "source", 260)
    (code, output), folder = adopted(tmp_path / "run", small, source)
    assert code == 0 and "3 ids below 260 have no token (257, 258, 259)" in output, output
    tokenizer = loaded(folder)
    assert tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id == 260
    assert len(tokenizer) == len(token_bytes(tokenizer)) == max(tokenizer.get_vocab().values()) + 1
    assert encode_text(tokenizer, ["the <|end|> <|unused 258|>"])[0][:1] == [256]
    assert not {257, 258, 259, 260} & set(encode_text(tokenizer, ["the <|end|> <|unused 258|>"])[0])


def test_vocabularies_that_are_mostly_holes_are_refused(tmp_path):
    from pipeline.core.errors import UserError
    from pipeline.data.tokenizer import byte_bpe
    from pipeline.tokenizer import Config, adopt

    for last, message in ((2**31 - 1, "2,147,483,391 of the ids below"), (2**40, "31 bits")):
        (tmp_path / "huge.tiktoken").write_bytes(byte_bpe.dump(BYTES | {b"ab": last}))
        with pytest.raises(UserError, match=message):
            adopt(Config(adopt=str(tmp_path / "huge.tiktoken")), tmp_path / "out")
    with pytest.raises(UserError, match="are filled"):
        adopt(Config(adopt=str(holed(tmp_path / "far", 20_000))), tmp_path / "out")
    with pytest.raises(UserError, match="gives id 116 to '<|end|>' and to 't'|id 116 is 't'"):
        adopt(Config(adopt=str(holed(tmp_path / "twice", 116))), tmp_path / "out")


def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path):
    """Its model was trained on one of the two readings, and nobody can tell which."""
    from pipeline.core.errors import UserError
    from pipeline.tokenizer import Config, adopt

    def written(name, last, **vocabulary):
        folder = holed(tmp_path / name, last)
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec["model"]["vocab"] |= {key.replace("end", "<|end|>"): value for key, value in vocabulary.items()}
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        return Config(adopt=str(folder))

    with pytest.raises(UserError, match=r"'<\|end\|>' has id 257 in its vocabulary and 300 among its added tokens"):
        adopt(written("elsewhere", 300, end=257), tmp_path / "out")
    for last in (257, 300):
        with pytest.raises(UserError, match="two tokens have the same id; copy the folder again"):
            adopt(written(f"twice{last}", last, aa=5), tmp_path / "out")


def test_damaged_files_are_reported(plain, small, tmp_path):
    def refused(place):
        (code, output), _ = adopted(tmp_path / f"run{len(list(tmp_path.iterdir()))}", small, place)
        assert code == 2 and "Traceback" not in output, output
        return output

    whole = (plain / "tokenizer.json").read_bytes()
    for number, left in enumerate((b"", whole[: len(whole) // 2], b"[]", b"null")):
        folder = tmp_path / f"cut{number}"
        shutil.copytree(plain, folder)
        (folder / "manifest.json").unlink()
        (folder / "tokenizer.json").write_bytes(left)
        output = refused(folder)
        assert "tokenizer.json: cannot be read" in output and "copy the folder again" in output, output
    assert "give the folder that contains it" in refused(plain / "tokenizer.json")
    form = next(path for name in ("tokenizer.model", "tokenizer.tiktoken") if (path := plain / name).exists())
    empty = tmp_path / f"empty{form.suffix}"
    empty.write_bytes(b"")
    assert "(0 bytes)" in refused(empty)
    if form.suffix == ".model":
        (tmp_path / "cut.model").write_bytes(form.read_bytes()[:3000])
        assert "is not a sentencepiece model, or is truncated" in refused(tmp_path / "cut.model")
        shutil.copytree(plain, tmp_path / "zero")
        (tmp_path / "zero/manifest.json").unlink()
        (tmp_path / "zero/tokenizer.model").write_bytes(b"")
        assert "tokenizer.model is empty (0 bytes)" in refused(tmp_path / "zero")


def test_a_tokenizer_that_encodes_at_random_and_a_tekken_folder_are_refused(tmp_path):
    from tokenizers import Tokenizer, models

    from pipeline.core.errors import UserError
    from pipeline.data.tokenizer import encode, fast_tokenizer, import_tokenizer

    Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.1)).save(
        str(tmp_path / "tokenizer.json")
    )
    for read in (encode.encoder, fast_tokenizer.load_tokenizer, lambda folder: import_tokenizer.load(folder, None)):
        with pytest.raises(UserError, match="dropout: 0.1, so that a text gets other ids each time"):
            read(str(tmp_path))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tekken.json")
    for place in (tmp_path, tmp_path / "tekken.json"):
        with pytest.raises(UserError, match="tekken.json is a tekken file, which is not supported"):
            import_tokenizer.load(str(place), None)


def test_a_truncated_sentencepiece_model_is_recognized(plain):
    from sentencepiece import sentencepiece_model_pb2

    from pipeline.data.tokenizer.spm_model import damage

    if not (plain / "tokenizer.model").exists():
        pytest.skip("byte-bpe has no sentencepiece model")
    model = (plain / "tokenizer.model").read_bytes()
    read = sentencepiece_model_pb2.ModelProto.FromString
    assert damage(model) is None
    for cut in (*range(0, len(model), 97), *range(len(model) - 300, len(model))):
        if damage(model[:cut]) is None:  # nothing that decides an id is lost
            left, all_of_it = read(model[:cut]), read(model)
            assert (left.pieces, left.trainer_spec, left.normalizer_spec) == (
                all_of_it.pieces,
                all_of_it.trainer_spec,
                all_of_it.normalizer_spec,
            ), cut


def test_a_byte_level_folder_without_eos_or_with_a_wrong_config_is_refused(tmp_path):
    from pipeline.core.errors import UserError
    from pipeline.data.tokenizer import byte_bpe
    from pipeline.tokenizer import Config, adopt

    byte_bpe.build(BYTES, [], "a", []).save(str(tmp_path / "tokenizer.json"))
    for config, message in (("{}", "has no eos token"), ("[]", "expected a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            adopt(Config(adopt=str(tmp_path)), tmp_path / "out")


def test_pairs_of_a_very_long_token_take_no_time():
    """Junk of equal letters gives tokens of tens of thousands of bytes; a file with one of 49,152 bytes was not read
    in nine minutes when each join looked at all neighbours."""
    from pipeline.data.tokenizer.byte_bpe import merges_of

    powers = [b"a" * 2**power for power in range(17)]
    assert merges_of({token: rank for rank, token in enumerate(powers)}) == [(half, half) for half in powers[:-1]]


def test_the_advice_for_too_little_text_does_not_go_below_the_smallest_vocab_size():
    from pipeline.data.tokenizer.spm_trainer import too_large

    assert "set vocab_size to at most 300" in str(too_large(5000, 300))
    assert "set vocab_size" not in str(too_large(300, 280)) and "train on more text" in str(too_large(300, 280))
