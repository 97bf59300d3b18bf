"""Rules of docs/contributing.md that a program can check."""

import ast
import functools
import sys

from paths import ROOT

FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
LONGEST_FUNCTION = 100  # lines


@functools.cache
def nodes(path) -> list[ast.AST]:
    """All nodes of a file's syntax tree; parsed once for all tests."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def test_no_function_is_longer_than_a_screen_or_two():
    long = []
    for path in FILES:
        functions = [node for node in nodes(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        for node in functions:
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "split these: " + "; ".join(long)


def test_no_private_name_is_imported_from_another_module():
    private = []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
                for alias in node.names:
                    if alias.name.startswith("_") and not alias.name.startswith("__"):
                        private.append(f"{path.relative_to(ROOT)}:{node.lineno} {alias.name}")
    assert not private, "make these public or move them: " + "; ".join(private)


def looked_up(path) -> list[tuple[int, str]]:
    """(line, first argument) of every getattr and hasattr."""
    calls = [node for node in nodes(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [(node.lineno, ast.unparse(node.args[0])) for node in calls if node.func.id in ("getattr", "hasattr")]


def test_what_the_core_asks_of_a_stage_is_a_method():
    """The core has no getattr and no hasattr, and nothing has one on a stage's config (StageConfig in core/config.py).
    In models/ a config is one of transformers, whose attributes depend on the family."""
    calls = []
    for path in FILES:
        for line, subject in looked_up(path):
            is_config = subject.split(".")[-1] == "config" and not subject.endswith("model.config")
            of_config = is_config and path.parent.name != "models"
            if path.parent.name == "core" or of_config:
                calls.append(f"{path.relative_to(ROOT)}:{line} {subject}")
    assert not calls, "give StageConfig a method for these: " + "; ".join(calls)


def test_the_core_names_no_stage():
    """Except in KINDS, the list that names them all."""
    from pipeline.core.recipe import KINDS

    named = []
    for path in (ROOT / "pipeline/core").glob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Constant) and node.value in KINDS:
                named.append(f"{path.name}:{node.lineno} {node.value!r}")
    listed = (ROOT / "pipeline/core/recipe.py").read_text().partition("\nKINDS = (")[2].partition(")")[0]
    assert len(named) == len(KINDS) == sum(f'"{kind}"' in listed for kind in KINDS), named


def test_no_module_beside_the_stage_scripts_hides_another_one():
    """A script's own folder is first on sys.path, so pipeline/tokens.py would be what `import tokens` finds."""
    from importlib.metadata import packages_distributions

    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - {"pipeline"}
    # and names of packages that users have beside alma
    taken |= {"evaluate", "datasets", "tokenizers", "transformers", "accelerate", "trl", "peft", "wandb", "ray", "vllm"}
    names = {
        path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert not names & taken


def test_no_conditional_expression_is_nested():
    nested = []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.IfExp):
                parts = (node.body, node.test, node.orelse)
                if any(isinstance(part, ast.IfExp) for part in parts):
                    nested.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not nested, "write these as statements: " + "; ".join(nested)
