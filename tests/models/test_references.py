"""What a recipe may write for a model from outside, and what is refused."""

import pytest

from pipeline.core.errors import UserError
from pipeline.models.references import Reference, is_reference, parse

SHA = "ab" * 32
COMMIT = "c1899de289a04d12100db370d81485cdf75e47ca"


@pytest.mark.parametrize(
    "text, place, name, file, revision, title",
    [
        ("./folder", "path", "./folder", "", "", "folder"),
        ("/models/x.gguf", "path", "/models/x.gguf", "", "", "x.gguf"),
        (f"Qwen/Qwen3-0.6B@{COMMIT}", "huggingface", "Qwen/Qwen3-0.6B", "", COMMIT, "Qwen/Qwen3-0.6B@c1899de289a0"),
        ("a/b@v1.0", "huggingface", "a/b", "", "v1.0", "a/b@v1.0"),
        ("a/b/q4.gguf@refs/pr/1", "huggingface", "a/b", "q4.gguf", "refs/pr/1", "a/b/q4.gguf@refs/pr/1"),
        ("modelscope:Qwen/Qwen3-0.6B@master", "modelscope", "Qwen/Qwen3-0.6B", "", "master", "Qwen/Qwen3-0.6B@master"),
        (f"package:p==1.0/m/x.gguf@{SHA}", "package", "p==1.0", "m/x.gguf", SHA, "p==1.0/m/x.gguf@abababababab"),
    ],
)
def test_forms(text, place, name, file, revision, title):
    reference = parse(text)
    assert is_reference(text) and reference == Reference(text, place, name, file, revision)
    assert reference.title == title and reference.is_gguf == text.partition("@")[0].endswith(".gguf")


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "Qwen/Qwen3-0.6B",
            "names no revision; write Qwen/Qwen3-0.6B@REVISION, a commit or tag of https://huggingface",
        ),
        ("a/b@", "names no revision; write a/b@REVISION"),
        ("modelscope:a/b", "a commit or tag of https://www.modelscope.cn/models/a/b, because a branch changes"),
        ("gpt2@main", "is neither a stage of this recipe nor a model; expected ORG/NAME@REVISION (Hugging Face)"),
        ("a/b/c@v1", "neither a stage of this recipe nor a model"),
        ("a/b@x y", "names no revision"),
        ("hf:a/b@v1", "neither a stage of this recipe nor a model"),
        ("package:p/x.gguf@" + SHA, "expected package:NAME==VERSION/FILE.gguf@SHA256"),
        ("package:p==1/x.gguf@abc", "the 64 hexadecimal digits of the file's sha256"),
        ("package:p==1/x.bin@" + SHA, "is not a file in a package"),
    ],
)
def test_other_forms_are_refused(text, said):
    assert is_reference(text)
    with pytest.raises(UserError) as caught:
        parse(text)
    assert said in str(caught.value)


def test_names_of_stages_are_no_references():
    assert not any(map(is_reference, ("sft", "sft-2", "llama_7b")))
