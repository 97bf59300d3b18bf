"""Which keys of a recipe a stage reads while it runs: every access to a field of a config from pipeline/ is noted."""

import os
import sys
from pathlib import Path

import pipeline
from pipeline.core.config import Strict

HERE = str(Path(pipeline.__file__).parent)
# These look at every key of every stage alike: identity, messages and records of a run.
ALIKE = {f"{HERE}/{name}.py" for name in ("recipe", "graph", "precheck", "output", "tracking", "recipe_schema")}
_noted: set[str] = set()


def _note(config, name: str) -> None:
    line = f"{type(config).__name__}.{name}"
    if line not in _noted:
        _noted.add(line)
        with open(os.environ["ALMA_TEST_TRACE"], "a") as file:  # also from forked workers, a short line at a time
            file.write(line + "\n")


def traced(kind: str, words: list[str], environment: dict, folder: str, log: str) -> None:
    """As harness._child, with the reads between the stage's `run` and its end noted in ALMA_TEST_TRACE."""
    import harness

    os.environ.update(environment)
    from pipeline.core.recipe import module_of

    stage = module_of(kind)
    run, plain, dump = stage.run, Strict.__getattribute__, Strict.model_dump

    def noting(self, name):
        fields = type(self).model_fields if not name.startswith("_") and name != "model_fields" else {}
        if name in fields:
            file = sys._getframe(1).f_code.co_filename
            if file.startswith(HERE) and file not in ALIKE:
                _note(self, name)
        return plain(self, name)

    def dumped(self, *arguments, **options):
        if sys._getframe(1).f_code.co_filename.startswith(f"{HERE}/data"):
            for name in type(self).model_fields:
                _note(self, name)
        return dump(self, *arguments, **options)

    def watched(*arguments):
        Strict.__getattribute__, Strict.model_dump = noting, dumped
        return run(*arguments)

    stage.run = watched
    harness._child(kind, words, environment, folder, log)
