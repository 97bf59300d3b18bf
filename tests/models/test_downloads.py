"""Models by name: downloaded once, found again without the network, and refused in one sentence."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import fake_hub
import pytest
import tiny_gguf
import tuned

from pipeline.core import artifact, chain, external_inputs
from pipeline.core.errors import Absent, UserError
from pipeline.core.precheck import checked
from pipeline.core.recipe import load
from pipeline.core.status import examine
from pipeline.data.sources import packages
from pipeline.models import downloads, gguf_file
from pipeline.models.references import parse


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tuned.base(tmp_path_factory.mktemp("hub")) / "model"


@pytest.fixture
def repository(base, tmp_path):
    """A repository with more than the model's own files."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in base.iterdir():
        os.link(path, folder / path.name)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the weights again")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """A hub with the repository org/tiny, and empty caches."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fake_hub.serving(fake_hub.Hub({"org/tiny": repository})) as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        yield server


def unreachable(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def refused(text: str) -> str:
    with pytest.raises(UserError) as caught:
        downloads.fetch(parse(text), "inputs.model")
    message = str(caught.value)
    assert message.startswith("inputs.model: ") and "\n" not in message
    return message


def test_a_repository_is_downloaded_once(hub, base, monkeypatch):
    reference = parse("org/tiny@v1")
    assert downloads.find(reference) is None and hub.asked == []
    model = downloads.fetch(reference, "inputs.model")
    fetched = sorted(path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path)
    assert fetched == sorted(path.name for path in base.iterdir()) == [path.name for path in model.files]
    hub.asked.clear()
    unreachable(monkeypatch)
    for name in ("org/tiny@v1", f"org/tiny@{fake_hub.COMMIT}"):
        assert downloads.find(parse(name)) == model == downloads.fetch(parse(name), "inputs.model")
    next(path for path in model.files if path.suffix == ".safetensors").unlink()  # as after an interrupted download
    assert downloads.find(reference) is None and hub.asked == []


def test_what_a_hub_does_not_give(hub, repository, monkeypatch):
    assert "org/tiny has no revision v2; those that there are: http" in refused("org/tiny@v2")
    assert "/org/none does not exist, or only for those who are logged in (hf auth login)" in refused("org/none@v1")
    assert "org/tiny@v1 has no file q4.gguf; its files: " in refused("org/tiny/q4.gguf@v1")
    hub.gated = ("org/tiny",)
    assert "only to those who accept its terms: do so at http" in refused("org/tiny@v1")
    hub.gated = ()
    (repository / "model.safetensors").unlink()
    assert "no safetensors weights; it has only a pickle (pytorch_model.bin), which can run" in refused("org/tiny@v1")
    (repository / "tiny-q4.gguf").write_bytes(b"")
    assert "name one of its GGUF files: org/tiny/tiny-q4.gguf@v1" in refused("org/tiny@v1")
    unreachable(monkeypatch)
    message = refused("org/tiny@v1")
    assert "org/tiny@v1 is not on this machine, and http" in message and "cannot be reached (" in message
    assert "run the same command where there is a network, or copy the model's folder here" in message
    assert not any("/resolve/" in path for path in hub.asked)


def test_modelscope(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "modelscope", None)
    reference = parse("modelscope:org/tiny@v1")
    assert "needs the package modelscope, which is not installed; run pip" in refused(reference.text)
    calls = []

    def snapshot_download(name, *, revision, local_dir, allow_patterns, ignore_patterns):
        calls.append((name, revision))
        assert ignore_patterns == ["*/*"] and "*.safetensors" in allow_patterns
        Path(local_dir).mkdir(parents=True)
        for path in repository.iterdir():
            if path.is_file():
                os.link(path, Path(local_dir) / path.name)
        if len(calls) == 1:
            raise ConnectionError("reset by peer")
        return local_dir

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert "www.modelscope.cn/models/org/tiny cannot be reached (reset by peer)" in refused(reference.text)
    assert downloads.find(reference) is None  # the files that came are not trusted
    shutil.rmtree(tmp_path / "cache" / "alma" / "modelscope")
    model = downloads.fetch(reference, "inputs.model")
    assert downloads.find(reference) == model and calls == [("org/tiny", "v1")] * 2
    assert "consolidated.safetensors" not in [path.name for path in model.files]


def test_the_real_library_of_modelscope_has_these_arguments():
    import inspect

    function = pytest.importorskip("modelscope").snapshot_download
    names = set(inspect.signature(function).parameters)
    assert {"revision", "local_dir", "allow_patterns", "ignore_patterns"} <= names


# ---- as inputs of a recipe -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tuned.write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(model: str) -> None:
    stages = f"sft: {{inputs: {{model: '{model}'}}, {tuned.COMMON}, steps: 2, sources: {{nouns: {{path: rows.jsonl, {tuned.CHAT}}}}}}}"
    Path("r.yaml").write_text(f"name: named\nstages:\n  {stages}\n", encoding="utf-8")


def one_sentence(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        chain.run(load("r.yaml", words))
    assert not list(Path("runs").glob("*/*/*"))  # no stage was started
    return str(caught.value)


def test_a_recipe_names_a_model_of_a_hub(hub, folder, base, monkeypatch):
    """Checked without the network, downloaded before the first stage, and then known by content and revision."""
    write_recipe("org/tiny@v1")
    checked("r.yaml", (), sources=True)
    node = examine(load("r.yaml"))["sft"]
    assert node.reason == "inputs.model: org/tiny@v1 is not on this machine yet; alma run fetches it"
    assert hub.asked == []
    assert "names no revision" in one_sentence("sft.inputs.model=org/tiny")
    assert "'org' is not another stage of this recipe; expected one of" in one_sentence("sft.inputs.model=org")
    assert "none.jsonl does not exist" in one_sentence("sft.sources.nouns.path=none.jsonl")
    assert hub.asked == []  # first what costs nothing
    assert "is more than the 64 positions of the model in 'org/tiny@v1'" in one_sentence("sft.sequence_length=65")
    read = external_inputs.read("model", "org/tiny@v1")
    assert read.manifest["origin"] == {"place": "huggingface", "name": "org/tiny", "revision": "v1"}
    assert read.stage == "org/tiny@v1"
    # the same files under a commit or in a folder are the same model
    assert read.digest == external_inputs.read("model", f"org/tiny@{fake_hub.COMMIT}").digest
    assert read.digest == artifact.external("model", base).digest
    hub.asked.clear()
    unreachable(monkeypatch)
    checked("r.yaml", (), sources=True)
    assert "is not on this machine, and http" in one_sentence("sft.inputs.model=org/tiny@v3")


def test_a_folder_that_is_no_model_is_refused_before_any_stage(folder, base):
    write_recipe("./m")
    assert "stages.sft.inputs.model: './m' is not a folder with files in it" in one_sentence()
    shutil.copytree(base, "m")
    (folder / "m/model.safetensors").unlink()
    assert "stages.sft.inputs.model: m: contains no weights (model.safetensors)" in one_sentence()
    assert "'./x.gguf' does not exist" in one_sentence("sft.inputs.model=./x.gguf")


@pytest.mark.slow
def test_a_gguf_file_is_unpacked_once(folder, monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_gguf.write(folder / "m.gguf", tiny_gguf.model(), tiny_gguf.backend())
    with pytest.raises(Absent, match="m.gguf is not on this machine yet; alma run fetches it"):
        external_inputs.read("model", "./m.gguf")
    external_inputs.fetch("model", "./m.gguf")
    monkeypatch.setattr(gguf_file, "convert", None)
    external_inputs.fetch("model", "./m.gguf")
    read = external_inputs.read("model", "./m.gguf")
    assert (
        read.stage == "m.gguf"
        and (read.path / "tokenizer.json").is_file()
        and list(read.manifest["files"]) == ["m.gguf"]
    )
    # the same file, from a package
    sha256 = read.manifest["files"]["m.gguf"]["sha256"]
    member = packages.cache_folder() / "members" / sha256 / "m.gguf"
    member.parent.mkdir(parents=True)
    os.link(folder / "m.gguf", member)
    packaged = external_inputs.read("model", f"package:made-up==1.0/inner/m.gguf@{sha256}")
    assert packaged.digest == read.digest and packaged.path == read.path
    assert packaged.manifest["origin"]["revision"] == sha256
    (folder / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="inputs.model: .*m.gguf: is not a GGUF file"):
        external_inputs.fetch("model", "./m.gguf")
    assert json.loads((packages.cache_folder() / "hashes.json").read_text())
