"""Recipes that are wrong in every way that a seed finds: shipped ones with values, keys, structure or bytes changed."""

import copy
import io
import random
from pathlib import Path

from paths import ROOT as HERE
from ruamel.yaml import YAML

ROOT = HERE / "recipes"
RECIPES = sorted(path for path in ROOT.glob("**/*.yaml"))
BOMB = "&a0 [x, x, x, x, x, x, x, x]"
for level in range(1, 12):
    BOMB = f"&a{level} [{BOMB}{f', *a{level - 1}' * 7}]"
# YAML as text, for words of the command line and for lines of a file
VALUES = [
    *("", "~", "0", "-1", "1", "3", "1000000000", "9223372036854775807", "99999999999999999999999999", "1e400", ".nan"),
    *(".inf", "-.inf", "0.5", "1e-300", "true", "false", "''", "' '", "a", "小猫", "a/b", "../..", ".", "/", "~root"),
    *("[]", "[[]]", "[0]", "['a', 'b']", "{}", "{a: 1}", "{a: {b: {c: 1}}}", "[{}, {}]", "[~]", "{? [a]: b}", "{~: 1}"),
    *(
        "{a: 1, 'a': 2}",
        "{1: a, '1': b}",
        "2024-01-01",
        "2024-01-01T10:00:00Z",
        "!!binary aGk=",
        "!foo bar",
        "!!set {a}",
    ),
    *(
        "!!python/object/apply:os.getcwd []",
        "!!omap [a: 1]",
        "&a [*a]",
        "{<<: *nowhere}",
        "*nowhere",
        '"\\0"',
        '"\\ud800"',
    ),
    *("'{'", "'{}'", "'{a.b.0}'", "https://", "s3://x", "file:///etc/passwd", "/dev/zero", "/dev/null", "auto", "none"),
    *("[" * 200, "[" * 40 + "]" * 40, "{a: " * 100 + "1" + "}" * 100, "x" * 300, "x" * 5000, "'./" + "y" * 400 + "'"),
    *(
        "[1, 2",
        "{a: ",
        "'",
        '"',
        "%",
        "@",
        "`",
        "|",
        "> 3",
        "? ",
        "- ",
        "a: b: c",
        "#",
        BOMB,
        "0x10",
        "0o7",
        "1_000",
        "٣",
    ),
]


def parsed(text: str):
    """A value as YAML has it, or the text itself where it is not YAML, or has aliases (they may stand for too much)."""
    if "&" in text:
        return text
    try:
        return YAML(typ="safe", pure=True).load(text)
    except Exception:
        return text


def leaves(node, key=()):
    """(key path) of everything in a tree."""
    yield key
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        yield from leaves(child, (*key, name))


def change(tree, draw: random.Random):
    """One change of a tree, in place: a value replaced, a key renamed, taken out, added, doubled or moved."""
    paths = [path for path in leaves(tree) if path]
    path = draw.choice(paths)
    holder = tree
    for part in path[:-1]:
        holder = holder[part]
    name, how = path[-1], draw.randrange(8)
    if how <= 3:
        holder[name] = parsed(draw.choice(VALUES))
    elif how == 4:
        del holder[name]
    elif how == 5 and isinstance(holder, dict):
        holder[draw.choice([str(name)[:-1], "x" * 3000, "1", "family", "from", "kind", "inputs", "", "extends"])] = (
            holder.pop(name)
        )
    elif how == 6:
        other = tree
        for part in draw.choice(paths):
            other = other[part]
        holder[name] = copy.deepcopy(other)
    else:
        holder[name] = [holder[name]] if draw.random() < 0.5 else {"a": holder[name]}


def broken_text(text: str, draw: random.Random) -> str:
    """A recipe's text with lines or characters changed."""
    for _ in range(draw.randrange(1, 4)):
        lines = text.split("\n")
        at, how = draw.randrange(len(lines)), draw.randrange(6)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, draw.choice(lines))
        elif how == 2:
            lines[at] = lines[at].replace(":", draw.choice(["", "::", ": -", ":\t"]), 1)
        elif how == 3:
            lines[at] = " " * draw.randrange(5) + lines[at]
        elif how == 4:
            head, colon, _ = lines[at].partition(":")
            lines[at] = f"{head}{colon} {draw.choice(VALUES)}"
        text = "\n".join(lines)
        if how == 5:
            at = draw.randrange(len(text) + 1)
            text = (
                text[:at]
                + draw.choice(["{", "}", "[", "]", "&a ", "*a ", "\x00", "\t", "\n", "---\n", "'", "#"])
                + text[at:]
            )
    return text


def made(seed: int, folder: Path) -> tuple[Path, list[str]]:
    """A recipe file in `folder` and the words that follow it on the command line."""
    draw = random.Random(seed)
    path = draw.choice(RECIPES)
    text, words = path.read_text(encoding="utf-8"), []
    target = folder / "sources" / "r.yaml" if path.parent.name == "sources" else folder / "r.yaml"
    how = draw.randrange(10)
    if how <= 4:
        tree = YAML(typ="safe", pure=True).load(text)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            change(tree, draw)
            if not tree:
                break
        buffer = io.StringIO()
        YAML(typ="safe", pure=True).dump(tree, buffer)
        text = buffer.getvalue()
    elif how <= 6:
        text = broken_text(text, draw)
    else:
        tree = YAML(typ="safe", pure=True).load(text)
        words = [word(tree, draw) for _ in range(draw.choice([1, 1, 2]))]
    target.write_text(text, encoding="utf-8", errors="surrogatepass")
    return target, words


KEYS = [
    *("pretrain.model.family", "pretrain.model.num_attention_heads", "pretrain.model.num_hidden_layers", "model"),
    *("pretrain.run.processes", "pretrain.run.nodes", "sft.sources.people.from", "sft.inputs.model", "extends", "name"),
    *(
        "output",
        "seed",
        "stages",
        "sources",
        "pretrain.steps",
        "pretrain.batch_size",
        "pretrain.micro_batch",
        "stages.x",
    ),
    *("pretrain.parallel.pipeline", "pretrain.parallel.layers", "clean.sources.text.path", "clean.sources", "pretrain"),
    *(
        "pretrain.mixture",
        "pretrain.mixture_changes",
        "tokenizer.adopt",
        "pack.shards",
        "export.inputs",
        "assess.compare",
    ),
    *("model.hidden_size", "model.rope_parameters", "model.num_attention_heads", "model.num_key_value_heads"),
    *("model.head_dim", "model.hidden_act", "model.layer_types", "pretrain.model", "pretrain.sequence_length"),
    *(
        "pretrain.time",
        "pretrain.tokens",
        "clean.where",
        "clean.sources.text.where",
        "clean.dedup.near",
        "a..b",
        "=",
        "",
    ),
]


def word(tree: dict, draw: random.Random) -> str:
    """A `key=value` word: a key that the recipe has, or one that it may have."""
    key = draw.choice(KEYS)
    if draw.random() < 0.6:
        path = draw.choice([path for path in leaves(tree) if path])
        key = ".".join(str(part) for part in (path[1:] if path[0] == "stages" and len(path) > 1 else path))
    return f"{key}={draw.choice(VALUES)}"
