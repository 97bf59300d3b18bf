"""Arguments that several commands of `alma` share."""

from typing import Annotated

import typer

from pipeline.core.errors import UserError

RecipeFile = Annotated[str, typer.Argument(help="Recipe file, or the name of a recipe that comes with alma.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(help="Names of stages, and key=value words that change the recipe.", metavar="[STAGE|key=value]..."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")]


def split(words: list[str] | None) -> tuple[list[str], list[str]]:
    """(names of stages, overrides) among the words of a command line; an override has a `=`."""
    words = words or []
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def one(stages: list[str]) -> str | None:
    """The stage that was named, or None. Raises UserError for several."""
    if len(stages) > 1:
        raise UserError(f"name one stage, not several: {', '.join(stages)}")
    return stages[0] if stages else None


def check_stage_names(stages: list[str], graph: dict, recipe: str) -> None:
    """Raise UserError for a stage that the recipe does not have."""
    for name in stages:
        if name not in graph:
            raise UserError(f"{recipe}: no stage is called {name!r}; expected one of {', '.join(graph)}")
