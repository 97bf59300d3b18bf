"""Rules of docs/contributing.md that a program can check."""

import ast
import sys

from paths import ROOT

FILES = sorted((ROOT / "pipeline").rglob("*.py"))
LONGEST_FUNCTION = 100  # lines


def functions(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_no_function_is_longer_than_a_screen_or_two():
    long = []
    for path in FILES:
        for node in functions(ast.parse(path.read_text(encoding="utf-8"))):
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "split these: " + "; ".join(long)


def test_no_private_name_is_imported_from_another_module():
    private = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
                for alias in node.names:
                    if alias.name.startswith("_") and not alias.name.startswith("__"):
                        private.append(f"{path.relative_to(ROOT)}:{node.lineno} {alias.name}")
    assert not private, "make these public or move them: " + "; ".join(private)


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
