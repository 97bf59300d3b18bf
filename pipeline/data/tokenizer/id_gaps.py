"""Ids without a token, filled so that each id has one."""

import json
from pathlib import Path

from pipeline.core.errors import UserError

MOST_UNUSED = 10_000  # ids that are filled; a vocabulary with more gaps is damaged
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def fill_gaps(backend, declared: dict[str, int], place: Path):
    """(tokenizer, remarks): the tokenizer with the same ids, with a special token <|unused ID|> for each id below the
    largest that had no token, and with the `declared` tokens at their declared ids.

    cl100k has no 100256, p50k no 50256. `tokenizers` numbers an added token by how many tokens there are, so that it
    would take the id of another one. It also ignores the ids of added tokens in a tokenizer.json. And a vocabulary in
    which each id has a token has as many tokens as a model needs rows. The space in the name keeps text from spelling
    such a token in a model that looks up whole words. Raises UserError for more than MOST_UNUSED such ids.
    """
    from tokenizers import Tokenizer

    expected = backend.get_vocab() | declared
    ids = set(expected.values())
    largest = max(ids)
    if largest + 1 == len(ids) and backend.get_vocab() == expected:
        return backend, ()
    _check_ids(expected, place)
    unused = {f"<|unused {index}|>": index for index in sorted(set(range(largest)) - ids)}
    spec = json.loads(backend.to_str())
    vocabulary = spec["model"]["vocab"]
    if not isinstance(vocabulary, dict):  # unigram: a list, in which the position is the id
        raise UserError(
            f"adopt: {place} has no token with id {min(unused.values(), default=largest)}, and a unigram vocabulary"
            " cannot be extended there; give each id a token"
        )
    for token in spec["added_tokens"]:
        vocabulary[token["content"]] = expected[token["content"]]
    vocabulary.update(unused)
    for name, index in unused.items():
        token = {"id": index, "content": name}
        token.update(PLAIN)
        spec["added_tokens"].append(token)
    for token in spec["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    spec["added_tokens"].sort(key=lambda token: token["id"])
    filled = Tokenizer.from_str(json.dumps(spec))
    expected = expected | unused
    if filled.get_vocab() != expected:
        differences = expected.items() - filled.get_vocab().items()
        name, index = min(differences, key=lambda item: item[1])
        raise UserError(
            f"adopt: {place} declares the token {name!r} with id {index}, and `tokenizers` reads another id; copy it"
            " again from where it was published"
        )
    if not unused:
        return filled, ()
    examples = ", ".join(map(str, list(unused.values())[:3])) + (", ..." if len(unused) > 3 else "")
    remark = f"{len(unused)} ids below {largest} have no token ({examples}) and are filled"
    return filled, (f"{remark} with special tokens <|unused ID|>",)


def _check_ids(vocabulary: dict[str, int], place: Path) -> None:
    token_of: dict[int, str] = {}
    for token, index in vocabulary.items():
        other = token_of.setdefault(index, token)
        if other != token:
            raise UserError(
                f"adopt: {place} gives id {index} to {other!r} and to {token!r}; copy it again from where it was"
                " published"
            )
    largest = max(token_of)
    num_gaps = largest + 1 - len(token_of)
    if num_gaps > MOST_UNUSED:
        raise UserError(
            f"adopt: {place} has no token for {num_gaps:,} of the ids below its largest, {largest:,}; a model would"
            f" need a row for each, and at most {MOST_UNUSED:,} are filled. Number its tokens from 0 without gaps"
        )
