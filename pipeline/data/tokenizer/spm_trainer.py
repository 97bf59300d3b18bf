"""Training with sentencepiece on whole documents without losing any text."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.special_tokens import BOS, END_OF_TURN, EOS, PAD, SPECIAL, TURN, UNKNOWN
from pipeline.data.tokenizer.spm_log import shown_while_training

# Longest run without a space that unigram is trained on, in characters. What an iteration costs grows with the square
# of a run's length (docs/tokenizer.md, "Measured"). Cutting does not change which pieces a run can consist of; only the
# pieces across a cut are not counted.
LONGEST_RUN = 1000
RESERVED = "\u2585"  # sentencepiece's trainer drops every sentence with this character


def sentences(texts: Iterable[str], longest: int | None = None) -> Iterator[str]:
    """Documents in a form in which sentencepiece's trainer reads all of their text.

    A sentence is a whole document with its newlines, so that "\\n\\n" and the like can become pieces. The Python
    iterator of sentencepiece 0.2.3 cuts newlines off the end of a sentence, so they are moved to its beginning. Its
    trainer drops a sentence with U+2585, so documents are split there, and this one character is encoded as bytes. Runs
    without a space of more than `longest` characters are split.
    """
    for text in texts:
        for section in text.split(RESERVED):
            sections = [section]
            if longest and len(section) > longest:
                sections = _split_runs(section, longest)
            for sentence in sections:
                body = sentence.rstrip("\r\n")
                if body:
                    yield sentence[len(body) :] + body


def _split_runs(text: str, longest: int) -> Iterator[str]:
    begin = 0
    for run in re.finditer("[^ ]+", text):
        for cut in range(run.start() + longest, run.end(), longest):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]


def default_coverage(texts: Iterable[str], vocab_size: int) -> float:
    """The character coverage at which characters take 40% of the vocabulary, within sentencepiece's limits; measured in
    docs/tokenizer.md.

    At the usual 0.9995 the hanzi of 11 MB of Chinese and English need 5,000 tokens, more than a small vocabulary has.
    """
    import numpy as np

    counts = np.zeros(0x110000, dtype=np.int64)
    for batch in _joined(texts, 1_000_000):
        codes = np.frombuffer(batch.encode("utf-32-le"), dtype=np.uint32)
        counts += np.bincount(codes, minlength=len(counts))
    descending = np.sort(counts[counts > 0])[::-1]
    covered = descending[: int(0.4 * vocab_size)].sum() / descending.sum()
    rounded_down = np.floor(covered * 10_000) / 10_000
    return float(min(0.9995, max(0.98, rounded_down)))


def _joined(texts: Iterable[str], size: int) -> Iterator[str]:
    """Texts put together into strings of about `size` characters."""
    batch, num_characters = [], 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters > size:
            yield "".join(batch)
            batch, num_characters = [], 0
    yield "".join(batch)


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    split_digits: bool,
    character_coverage: float,
    log: Path,
    kind: str = "bpe",
    special: list[str] = (),
    merge_whitespace: bool = True,
) -> bytes:
    """A sentencepiece model of `kind` bpe or unigram, as bytes. Ids 0-5 are unknown, bos, eos, pad and the marks of a
    turn, then come the tokens of `special`, then the 256 bytes.

    Asserts that the trainer counted as many characters as it was given, because it skips text without an error.
    """
    import sentencepiece

    # In unigram, text that spells a special or byte token can be kept from becoming it (spm_model.NEVER) only if none
    # of its characters is unknown.
    required = ""
    if kind == "unigram":
        required = "".join(sorted(set("".join((*SPECIAL, *special, UNKNOWN, "<0x0123456789ABCDEF>")))))
    counter = _CharacterCounter(special)
    model = _Buffer()
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _stderr_to(log), shown_while_training(log):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=counter.counted(sentences(texts, LONGEST_RUN if kind == "unigram" else None)),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=merge_whitespace,
                split_digits=split_digits,
                max_sentence_length=2**30,  # the default, 4192 bytes, skips longer lines without an error
                # The number is part of the model file, and several threads would add up unigram's expectations in
                # another order. BPE has one thread anyway.
                num_threads=1,
                # The character count is read from the log. This is the default, but another training in this process
                # may have changed it for all.
                minloglevel=0,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                unk_piece=UNKNOWN,
                bos_piece=BOS,
                eos_piece=EOS,
                pad_piece=PAD,
                control_symbols=[TURN, END_OF_TURN, *special],
                required_chars=required,
            )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from None
    log_text = log.read_text(encoding="utf-8", errors="replace")
    trained_on = int(re.findall(r"all chars count=(\d+)", log_text)[-1])
    assert trained_on == counter.total, f"sentencepiece read {trained_on} of {counter.total} characters; see {log}"
    return bytes(model.data)


class _CharacterCounter:
    """Counts characters as sentencepiece's trainer does: NUL does not count, and a spelled special token counts as one
    character."""

    def __init__(self, special: list[str]):
        names = sorted([UNKNOWN, *SPECIAL, *special], key=len, reverse=True)
        self.spelled = re.compile("|".join([*map(re.escape, names), "<0x[0-9A-F]{2}>"]))
        self.total = 0

    def counted(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.total += len(text) - text.count("\0")
            for name in self.spelled.findall(text):
                self.total -= len(name) - 1
            yield text


class _Buffer:
    def __init__(self):
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


@contextlib.contextmanager
def _stderr_to(path: Path):
    """Send what C++ writes to stderr into a file."""
    original = os.dup(2)
    with open(path, "wb") as handle:
        os.dup2(handle.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _explained(message: str, vocab_size: int) -> Exception:
    """The trainer's error in the words of a recipe, if it is a mistake of the user."""
    too_high = re.search(r"Please set it to a value <= (\d+)", message)
    if too_high:
        return too_large(vocab_size, int(too_high.group(1)))
    too_low = re.search(r"required_chars. \d+ vs (\d+)", message)
    if too_low:
        return UserError(
            f"vocab_size: {vocab_size} is too small for the characters of this text, which need {too_low.group(1)}; set"
            " it higher, or lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return UserError("the training text is empty: there is nothing to learn a vocabulary from")
    return RuntimeError(message)


def too_large(vocab_size: int, most: int) -> UserError:
    """`most`: tokens at which all pairs of the text are merged."""
    advice = f"set vocab_size to at most {most}, or train on more text"
    if most < 300:
        advice = "the smallest allowed vocab_size is 300, so train on more text, or adopt a tokenizer"
    return UserError(
        f"vocab_size: {vocab_size} is more than this text supports: all its pairs are merged at {most}; {advice}"
    )
