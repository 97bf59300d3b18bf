"""`alma plan`: its options."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.cli_arguments import Json, RecipeFile, Words, check_stage_names, split
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.core.recipe import load
from pipeline.core.shipped_recipes import located
from pipeline.core.terminal import show


def plan(
    recipe: RecipeFile,
    words: Words = None,
    on: Annotated[
        str, typer.Option("--on", help="Devices, NUMBERxDEVICE: A100-80G, H100, H200, B200, MI300X, RTX4090, ...")
    ] = "8xH100-80G",
    per_node: Annotated[int | None, typer.Option("--per-node", min=1, help="Devices of a node.")] = None,
    network: Annotated[
        float | None, typer.Option("--network", min=0.01, help="GB/s between nodes, per device and direction.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Of a device per hour, for the cost.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many layouts are shown.")] = 5,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the first layout of each planned stage into the recipe's file.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Memory, speed, time and cost of the training stages on other devices, before anything runs: every layout that
    they can have there, the fastest that fit first. Needs no GPU and reads no data."""
    from pipeline.checks import plan_report, plan_stages
    from pipeline.models.devices import parse

    if apply and located(Path(recipe)) != Path(recipe):
        raise UserError(
            f"{recipe}: --apply: this recipe comes with alma and is not changed; copy it first: alma recipe copy"
            f" {recipe}"
        )
    cluster = parse(on, per_node, network)
    stages, overrides = split(words)
    graph = nodes(load(recipe, overrides))
    check_stage_names(stages, graph, recipe)
    found = plan_stages.plan_recipe(graph, stages, cluster)
    if as_json:
        print(json.dumps(plan_report.as_json(found, cluster, price, top)))
    else:
        show("\n".join(plan_report.lines(found, cluster, price, top)))
    if apply:
        _apply(recipe, found, cluster, as_json)


def _apply(recipe: str, found, cluster, quiet: bool) -> None:
    from pipeline.checks.plan_apply import apply, inherits

    path, changes = Path(recipe), {}
    explicit = inherits(path)
    for stage in found.stages:
        if not stage.fitting:
            raise UserError(f"{recipe}: --apply: no layout of {stage.name} fits {cluster}; nothing was written")
        changes |= stage.recipe_keys(stage.best, explicit)
    lines = apply(path, changes)
    if not quiet:
        show("\n".join([f"{recipe}: written; comments are as they were", *lines]))
