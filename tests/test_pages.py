"""What pages say of the program: commands, keys of recipes, messages; and that the pages of both languages and of the
site belong together. Links, paths and lines: tests/test_docs.py."""

import copy
import functools
import itertools
import json
import re
import shlex

import messages
import pages
import pytest
import recipe_reference
from pages import DOCS, PAGES, inline_code, page_id, prose, structure
from paths import ROOT
from ruamel.yaml import YAML, YAMLError


@pytest.mark.parametrize("page", sorted((DOCS / "tutorials").glob("*.zh.md")), ids=page_id)
def test_chinese_tutorials_have_the_same_steps(page):
    english = page.with_name(page.name.replace(".zh", ""))
    shapes = [structure(path.read_text(encoding="utf-8")) for path in (english, page)]
    assert shapes[0]["headings"] == shapes[1]["headings"] and shapes[0]["tables"] == shapes[1]["tables"]
    assert code_of(english) == code_of(page)
    assert inline_code(english.read_text(encoding="utf-8")) == inline_code(page.read_text(encoding="utf-8"))


def code_of(page) -> list[tuple]:
    """Files and commands of a page without their comments; blocks without a language are pictures and lists."""
    blocks = [block for block in pages.blocks(page) if block.language]
    return [(block.language, block.title, block.not_run, re.sub(r"[ \t]*#.*", "", block.text)) for block in blocks]


def test_every_stage_has_a_page_in_both_languages():
    from pipeline.core.recipe import KINDS

    missing = [name for kind in KINDS for name in (f"{kind}.md", f"{kind}.zh.md") if not (DOCS / name).exists()]
    assert not missing


# ---- the site ---------------------------------------------------------------------------------------------------------


def listed(entry) -> list[str]:
    """Pages of the site's navigation, or of a part of it."""
    if isinstance(entry, str):
        return [entry]
    items = entry.values() if isinstance(entry, dict) else entry
    return [page for item in items for page in listed(item)]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = YAML(typ="safe", pure=True).load(re.sub(r"!!python/\S+", "", text))
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if not path.name.endswith(".zh.md")]
    assert sorted(listed(config["nav"])) == sorted(there)
    titles = re.findall(r"^ +- ([\w ]+):", text[text.index("\nnav:") :], flags=re.MULTILINE)
    translations = config["plugins"][2]["i18n"]["languages"][1]["nav_translations"]
    assert set(titles) == set(translations)


def test_chinese_pages_have_an_english_one():
    """Headings and the navigation are made from the English page's name."""
    alone = [page.name for page in DOCS.rglob("*.zh.md") if not page.with_name(page.name.replace(".zh", "")).exists()]
    assert not alone


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_lists_begin_after_an_empty_line(page):
    """The site's Markdown takes a list that follows a line of text for a part of that paragraph."""
    lines = prose(page.read_text(encoding="utf-8"))
    found = []
    for (before_number, before), (number, line) in itertools.pairwise(lines):
        begins = re.match(r"(\*|-|\d+\.) ", line)
        in_list = re.match(r"(\*|-|\d+\.|#| ) ?", before)
        if begins and before.strip() and not in_list and number == before_number + 1:
            found.append(f"{page.name}:{number}: {line[:60]}")
    assert not found, "put an empty line before these lists:\n" + "\n".join(found)


def test_the_reference_of_keys_is_current():
    current = recipe_reference.PAGE.read_text(encoding="utf-8")
    assert current == recipe_reference.page(), "run `python tests/helpers/recipe_reference.py`"


# ---- commands and recipes ---------------------------------------------------------------------------------------------

# Programs that are not alma's, and what is known of their commands in the documentation.
ELSEWHERE = {
    "pip": "installs from the network; make test-wheel installs alma",
    "source": "of the shell",
    "cd": "of the shell",
    "git": "not alma's",
    "wait": "of the shell",
    "for": "of the shell",
    "done": "of the shell",
    "curl": "tests/serve/test_server.py sends such requests",
    "accelerate": "tests/test_launchers.py and tests/test_launch.py start stages by it",
    "torchrun": "tests/test_launchers.py",
    "deepspeed": "tests/test_launchers.py",
    "srun": "tests/cluster has a Slurm of its own",
    "sbatch": "tests/cluster has a Slurm of its own",
    "bash": "launch/slurm/alma.sbatch: tests/cluster",
    "ssh": "tests/test_launchers.py starts what it would start",
    "hf": "needs the network",
    "docker": "needs Docker; tests/test_images.py builds and runs the CPU image without it",
    "apptainer": "not run anywhere",
    "enroot": "not run anywhere",
    "llama-server": "of llama.cpp",
    "llama-quantize": "of llama.cpp",
    "ollama": "not run anywhere",
    "zstdcat": "of zstd",
    "echo": "of the shell",
    "export": "of the shell",
}


def lines_of_commands(page) -> list[tuple[int, str]]:
    """Line of the block, and each command in it: those of shell blocks, and of blocks without a language the lines that
    begin with a program's name."""
    found = []
    for block in pages.blocks(page):
        if block.language not in ("", "sh", "bash", "console"):
            continue
        for line in pages.commands(block):
            line = re.sub(r"^(\$ |[A-Z_]+=\S+ )+", "", line)
            program = line.split()[0] if line.split() else ""
            if block.language == "sh" or program in ("alma", "python", "make") or program in ELSEWHERE:
                found += [(block.line, part) for part in parts_of(line)]
    return found


def parts_of(line: str) -> list[str]:
    """The commands of a line that has several, without what is redirected."""
    parts = [line] if line.startswith("ssh ") else re.split(r" (?:&&|\|) ", line)
    return [re.sub(r" [<>] \S+", "", part).strip() for part in parts]


def inline_commands(page) -> list[tuple[int, str]]:
    """Commands of alma within lines of text."""
    found = []
    for number, line in prose(page.read_text(encoding="utf-8")):
        codes = re.findall(r"`(alma [^`]+)`", line)
        found += [(number, part) for code in codes for part in parts_of(code)]
    return found


@functools.cache
def command_line():
    import typer

    from pipeline.cli import app

    return typer.main.get_command(app)


def problem_of(words: list[str]) -> str | None:
    """What alma would say of the command's name and options, or None. Words that a page leaves to the reader, such as
    RECIPE, may be missing, and values are not looked at."""
    import typer

    command, name, *rest = command_line(), *words
    while isinstance(command, typer.core.TyperGroup) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    if isinstance(command, typer.core.TyperGroup):
        return None
    try:
        command.make_context(name, list(rest))
    except typer.Exit:
        return None
    except Exception as error:  # of typer's own copy of click
        kind = type(error).__name__
        if kind in ("MissingParameter", "BadParameter"):
            return None
        if kind in ("NoSuchOption", "UsageError", "BadOptionUsage"):
            return str(error)
        raise
    return None


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_of_alma_exist_with_their_options(page):
    wrong = []
    for line, command in [*lines_of_commands(page), *inline_commands(page)]:
        words = shlex.split(command) if command.startswith("alma ") else []
        problem = problem_of(words) if words else None
        if problem:
            wrong.append(f"{page.name}:{line}: {command}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_other_commands_are_known(page):
    """Scripts and targets exist; what another program does is said in ELSEWHERE."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    wrong = []
    for line, command in lines_of_commands(page):
        program, *words = command.split()
        program = program.rsplit("/", 1)[-1]
        if program == "make":
            known = words and words[0] in targets
        elif program == "python":
            scripts = [word for word in words if re.fullmatch(r"[\w/]+\.py", word)]
            known = all((ROOT / script).exists() for script in scripts)
        else:
            known = program == "alma" or program in ELSEWHERE
        if not known:
            wrong.append(f"{page.name}:{line}: {command}")
    assert not wrong, "\n".join(wrong)


@functools.cache
def partial_schema() -> dict:
    """The schema of recipes without what is required, for the parts of recipes that pages show."""
    schema = json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"))
    schema = copy.deepcopy(schema)
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("required"), list):
                del node["required"]
            stack += node.values()
        elif isinstance(node, list):
            stack += node
    return schema


def without_dots(node):
    """A part of a recipe without the `...` that stand for more keys."""
    if isinstance(node, dict):
        return {key: without_dots(value) for key, value in node.items() if key != "..." and value != "..."}
    if isinstance(node, list):
        return [without_dots(value) for value in node if value != "..."]
    return node


def as_recipe(part) -> dict | None:
    """A block of YAML as a recipe: a complete one, some stages, or None if it is neither."""
    from pipeline.core.recipe import KINDS

    if not isinstance(part, dict):
        return None
    top = {"name", "output", "seed", "extends", "sources", "model", "resources", "stages"}
    recipe = {key: value for key, value in part.items() if key in top}
    stages = {key: value for key, value in part.items() if key in KINDS}
    kinds = {key: value for key, value in part.items() if isinstance(value, dict) and "kind" in value}
    if set(part) - set(recipe) - set(stages) - set(kinds) or not (stages or kinds or "stages" in recipe):
        return None
    recipe["stages"] = {**recipe.get("stages", {}), **stages, **kinds}
    return recipe


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_recipes_of_a_page_have_keys_that_exist(page):
    import jsonschema

    validator = jsonschema.Draft202012Validator(partial_schema())
    wrong = []
    for block in pages.blocks(page):
        if block.language != "yaml":
            continue
        try:
            reader = YAML(typ="safe", pure=True)
            reader.allow_duplicate_keys = True  # several variants of a stage in one block
            part = reader.load(block.text)
        except YAMLError as error:
            wrong.append(f"{page.name}:{block.line}: {error}")
            continue
        recipe = as_recipe(without_dots(part))
        for error in validator.iter_errors(recipe) if recipe else ():
            wrong.append(f"{page.name}:{block.line}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [DOCS / "troubleshooting.md", DOCS / "troubleshooting.zh.md"], ids=page_id)
def test_messages_are_those_of_the_code(page):
    """In tables of messages, what is quoted in the first column; torch's own are named as such."""
    text = page.read_text(encoding="utf-8")
    tables = text[: text.rindex("\n### ")]  # the last one is of symptoms without a message
    rows = re.findall(r"^\| (?!torch)(.*?`.*?) \|", tables, flags=re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 50
    unknown = [message for message in quoted if not messages.is_printed(message)]
    assert not unknown
