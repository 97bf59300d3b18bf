"""Distillation in stage sft: the student comes near the teacher, the teacher reads what the student reads, mistakes, and
a killed run ends as if it had not been. The loss itself: test_loss_preference.py; how a batch is divided:
test_objectives.py."""

import shutil

import pytest
import torch
import tuned
from harness import files_of, launch, stage, succeed

from pipeline.models import build

STAGE = f"""
  small:
    {{kind: sft, inputs: {{model: ./small, teacher: sft}}, {tuned.COMMON}, steps: 30, optimizer: {{lr: 5e-3}},
     max_prompts: 0, distill: {{}}, sources: {{nouns: {{path: rows.jsonl, {tuned.CHAT}}}}}}}
"""


def world(folder) -> None:
    tuned.copy_until("reward", folder)
    tuned.base(folder / "small", hidden=32)
    (folder / "tiny.yaml").write_text(tuned.RECIPE + STAGE, encoding="utf-8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    world(folder)
    return folder, succeed("sft", "tiny.yaml", "--stage", "small", cwd=folder)


def test_the_student_comes_near_the_teacher(plain):
    """Its held-out divergence, and, by its published weights, its probabilities of an answer's tokens."""
    folder, text = plain
    found = tuned.metrics(folder, "small")
    assert found["heldout_kl_after"] < 0.5 * found["heldout_kl_before"] and found["warnings"] == []
    assert found["heldout_loss_after"] == pytest.approx(found["heldout_kl_after"], rel=1e-6)
    assert found["heldout_cross_entropy_after"] < found["heldout_cross_entropy_before"]
    assert "teacher" in text
    models = [build.load(folder / f"runs/tiny/{name}/current/model").eval() for name in ("sft", "small")]
    start = build.load(folder / "small/model").eval()
    ids = torch.tensor([[7, 8, 9, 30, 40, 50, 60, 70]])
    teacher, student, before = (model(ids).logits.log_softmax(-1).detach() for model in (*models, start))
    apart = [(teacher.exp() * (teacher - other)).sum(-1).mean() for other in (student, before)]
    assert apart[0] < apart[1]


@pytest.mark.slow
def test_a_model_is_no_distance_from_itself(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    words = ["small.inputs.model=sft", "small.steps=1", "small.distill={weight: 0.5, divergence: reverse}"]
    succeed("sft", "tiny.yaml", "--stage", "small", *words, cwd=tmp_path)
    found = tuned.metrics(tmp_path, "small")
    assert found["heldout_kl_before"] == pytest.approx(0, abs=1e-6)
    assert found["heldout_loss_before"] == pytest.approx(0.5 * found["heldout_cross_entropy_before"], rel=1e-5)


@pytest.mark.slow
def test_killed_and_resumed(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/tiny/small")
    for fault in ("save:2", "work:6"):
        code, text = stage("sft", "tiny.yaml", "--stage", "small", cwd=tmp_path, fault=fault)
        assert code == -9, text
    succeed("sft", "tiny.yaml", "--stage", "small", cwd=tmp_path)
    expected, found = (files_of(where / "runs/tiny/small/current") for where in (plain[0], tmp_path))
    assert expected == found


TWO_RANKS = """
import sys
from pipeline.core.stage import run_stage
from pipeline.core.recipe import load
from pipeline.core import distributed
words = ["small.steps=4", f"small.parallel={{{sys.argv[1]}}}", "small.micro_batch=1", "small.run.processes=2"]
run_stage(load("tiny.yaml", [*words, "small.inputs.teacher=./large"]), "small")
distributed.barrier()
distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shard: full", "zero: 3", ""])
def test_two_processes_like_one(plain, layout, tmp_path):
    """Losses and evaluations to 1e-5, with the teacher split as the student is. One process has one micro-batch of
    held-out rows more than the other."""
    shutil.copytree(plain[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    shutil.copytree((tmp_path / "runs/tiny/sft/current").resolve(), tmp_path / "large")
    shutil.rmtree(tmp_path / "runs/tiny/small")
    (tmp_path / "two.py").write_text(TWO_RANKS)
    launch(2, "two.py", layout, cwd=tmp_path)
    one, two = ([line for line in tuned.lines(where, "small") if "loss" in line] for where in (plain[0], tmp_path))
    assert len(two) == 4
    for key in ("loss", "kl", "cross_entropy", "grad_norm"):
        expected = [line[key] for line in one[:4]]
        assert [line[key] for line in two] == pytest.approx(expected, abs=1e-5), key
    before, expected = (tuned.metrics(where, "small")["heldout_kl_before"] for where in (tmp_path, plain[0]))
    assert before == pytest.approx(expected, abs=1e-5)


TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
MARK{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
MARK{% endif -%}"""


def test_a_template_of_the_student_alone(plain, tmp_path):
    """The teacher keeps its own: another one is warned of, and one whose tokens the teacher lacks is refused."""
    shutil.copytree(plain[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    assert "chat template is another one" not in plain[1]
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("MARK", "> "))
    words = ["small.chat_template=other.jinja", "small.steps=1"]
    text = succeed("sft", "tiny.yaml", "--stage", "small", *words, cwd=tmp_path).replace("\n", " ")
    assert "teacher: WARNING: its chat template is another one" in text
    (tmp_path / "tokens.jinja").write_text(TEMPLATE.replace("MARK", "<|think|>"))
    words = ["small.chat_template=tokens.jinja", "small.steps=1"]
    code, text = stage("sft", "tiny.yaml", "--stage", "small", *words, cwd=tmp_path)
    message = "adds the tokens <|think|>, which the teacher"
    assert code == 2 and message in text.replace("\n", " ") and "Traceback" not in text, text


def test_mistakes_are_sentences(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "small/model", tmp_path / "other/model")
    path = tmp_path / "other/model/tokenizer.json"
    text = path.read_text(encoding="utf-8")
    assert '"A":' in text and '"B":' in text
    path.write_text(text.replace('"A":', '"_":').replace('"B":', '"A":').replace('"_":', '"B":'), encoding="utf-8")
    for words, message in (
        (["small.distill=~"], "inputs.teacher is read with `distill` only"),
        (["small.inputs={model: ./small}"], "distill needs a model to learn from"),
        (["small.loss_chunk=64"], "loss_chunk: 64 has no effect with distill"),
        (["small.inputs.teacher=reward"], "is of kind reward, expected sft or dpo or kto"),
        (["small.inputs.teacher=./other"], "has another tokenizer than the model that is trained"),
    ):
        code, text = stage("sft", "tiny.yaml", "--stage", "small", *words, cwd=tmp_path)
        assert code == 2 and message in text.replace("\n", " ") and "Traceback" not in text, text
