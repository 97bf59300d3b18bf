"""Recipes that come with alma are found by name, in any folder, and never in place of a file."""

from pathlib import Path

import pytest
from paths import ROOT

from pipeline.core import shipped_recipes
from pipeline.core.errors import UserError
from pipeline.core.recipe import load, resolved

OWN = "name: own\nstages:\n  export: {inputs: {model: ./model}}\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_name_is_the_recipe_of_the_repository_and_has_its_identities():
    assert shipped_recipes.names() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    for name in ("quickstart", "qwen3-0.6b", "glm-4-9b-0414"):  # itself, extends a file, extends one that extends
        assert resolved(load(name)) == resolved(load(ROOT / "recipes" / f"{name}.yaml"))


def test_a_file_of_the_name_wins_and_a_folder_does_not(tmp_path):
    (tmp_path / "quickstart").mkdir()
    assert load("quickstart").name == "quickstart"
    (tmp_path / "mistral-7b").write_text(OWN)
    assert load("mistral-7b").name == "own"


def test_a_recipe_anywhere_extends_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: qwen3-0.6b\nname: mine\nstages: {pretrain: {steps: 7}}\n")
    mine, shipped = load("mine.yaml"), load("qwen3-0.6b")
    assert mine.stages["pretrain"].steps == 7 and mine.stages["clean"] == shipped.stages["clean"]
    (tmp_path / "qwen3-0.6b").write_text(OWN)  # a file next to it wins
    with pytest.raises(UserError, match="stages.pretrain"):  # whose stage pretrain has only `steps`
        load("mine.yaml")


def test_a_copy_works_where_it_is(tmp_path):
    path = shipped_recipes.copy("glm-4-9b-0414", Path())
    assert path.read_bytes() == (ROOT / "recipes/glm-4-9b-0414.yaml").read_bytes()
    assert resolved(load(path)) == resolved(load("glm-4-9b-0414"))
    for target, message in (
        (Path(), "glm-4-9b-0414.yaml: exists already"),
        (Path("nowhere"), "neither a folder nor a file ending in .yaml"),
    ):
        with pytest.raises(UserError, match=message):
            shipped_recipes.copy("glm-4-9b-0414", target)
    with pytest.raises(UserError, match="no recipe called '../quickstart' comes with alma; it has baichuan-7b"):
        shipped_recipes.copy("../quickstart", Path())


@pytest.mark.parametrize(
    "name, message",
    [
        ("quickstart.yaml", "no such recipe; its folder has no recipes; without a folder and .yaml, quickstart is the"),
        ("quickstar", "no such recipe.*`alma recipe list` shows those that come with alma"),
        ("sources/text", "no such recipe"),
        ("../quickstart", "no such recipe"),
    ],
)
def test_what_is_not_there_is_said(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


@pytest.mark.parametrize("parent", ["nosuch", "../recipes/quickstart.yaml", "/quickstart"])
def test_extends_of_what_is_not_there_is_refused(tmp_path, parent):
    (tmp_path / "mine.yaml").write_text(f"extends: {parent}\nname: mine\n")
    with pytest.raises(UserError, match="mine.yaml:1: `extends` names .*, which does not exist"):
        load("mine.yaml")


def test_a_shipped_recipe_is_not_changed_in_place():
    from typer.testing import CliRunner

    from pipeline.cli import app

    answer = CliRunner().invoke(app, ["plan", "gpt2-124m", "--apply"])
    assert "comes with alma and is not changed; copy it first: alma recipe copy gpt2-124m" in str(answer.exception)


def test_each_recipe_has_a_description():
    for name in shipped_recipes.names():
        assert 20 < len(shipped_recipes.description(name)) < 200, name
