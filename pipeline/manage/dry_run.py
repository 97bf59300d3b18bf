"""`alma run --dry-run`: which stages would run, why, and about how long that takes."""

from dataclasses import dataclass

from pipeline.checks.tables import console, new_table
from pipeline.core import external_inputs
from pipeline.core.chain import check_first
from pipeline.core.chain_summary import seconds as duration
from pipeline.core.checkpoint_folder import step_of
from pipeline.core.cli_arguments import check_stage_names
from pipeline.core.errors import Problems, UserError
from pipeline.core.fork import NothingToFork, fork_source
from pipeline.core.graph import Node, ancestors, nodes
from pipeline.core.partial_runs import partials, worth_keeping
from pipeline.core.recipe import Recipe
from pipeline.core.status import as_run
from pipeline.core.terminal import plural, show
from pipeline.manage.durations import Estimate, earlier_runs, estimate


@dataclass(frozen=True)
class Planned:
    """What would become of a stage."""

    stage: str
    action: str
    """up to date, not needed, resume, run, or refused."""
    reason: str
    time: Estimate | None = None


def dry_run(recipe: Recipe, only: list[str], *, restart: bool = False, fork: bool = False) -> None:
    """Check everything that `alma run` checks before its first stage, and show what it would do. Nothing is run,
    downloaded or written, except for hashes of sources. Raises UserError where `alma run` would."""
    graph = nodes(recipe)
    check_stage_names(only, graph, f"recipe {recipe.name}")
    needed = ancestors(graph, only) if only else set(graph)
    forced = set(only) if only else set(graph)
    absent = check_first(recipe, graph, needed, forced if restart else set(), set(only), fetch=False)
    earlier = earlier_runs(recipe.output)
    problems = Problems()
    plans = []
    for name, node in graph.items():
        if name not in needed:
            continue
        again = restart and name in forced and (node.state != "up to date" or bool(only))
        with problems.gather():
            action, reason, forked_at = "not needed", node.reason, 0
            if name not in absent:
                action, reason, forked_at = _action(node, graph, again, fork)
            time = None
            if action in ("run", "resume"):
                time = estimate(node, earlier.get(node.config.kind, []), action == "resume", forked_at)
            plans.append(Planned(name, action, reason, time))
    _show(plans, graph)
    problems.refuse()


def _action(node: Node, graph: dict[str, Node], again: bool, fork: bool) -> tuple[str, str, int]:
    """(action, reason, step that --fork continues from or 0). Raises UserError if `alma run` would stop here."""
    if node.state == "running":
        raise UserError(f"{node.folder}: another run is writing here: {node.reason}; wait for it, or end it")
    if again:
        return "run", "--restart", 0
    if node.state == "up to date":
        return "up to date", node.reason, 0
    if node.state == "interrupted":
        last = node.config.last_step()
        of = f" of {last:,}" if last and node.reason.startswith("at step") else ""
        return "resume", node.reason + of, 0
    if fork and node.config.HAS_STEPS and node.identity:
        try:
            source = fork_source(node.folder, as_run(node, graph), node.name, node.config.last_step())
            step = step_of(source)
            return "run", f"--fork, from step {step:,} of {source.parents[1].name}", step
        except NothingToFork as nothing:
            return "run", f"--fork has no checkpoint to continue from ({nothing.reason}): from step 0", 0
    others = [path for path in partials(node.folder) if node.identity and worth_keeping(path)]
    if others and not fork:
        raise UserError(
            f"{others[-1]}: an unfinished run of stage {node.name} was made by another recipe ({node.reason}). Put the"
            " recipe back to finish it, or give --restart to start again, or --fork to continue from its last"
            " checkpoint"
        )
    return "run", _why(node, graph), 0


def _why(node: Node, graph: dict[str, Node]) -> str:
    parts = [node.reason or node.state]
    pending = [source for source in node.parents.values() if source in graph and graph[source].state != "up to date"]
    if node.output and pending:
        parts.append(f"stays as it is if {' and '.join(pending)} comes out the same")
    for source in node.parents.values():
        if source not in graph and external_inputs.must_be_fetched(source):
            parts.append(f"downloads {source}")
    return "; ".join(parts)


def _show(plans: list[Planned], graph: dict[str, Node]) -> None:
    table = new_table("stage", "", "why", "about", "estimated", text=("stage", "", "why", "estimated"))
    for plan in plans:
        basis = plan.time.text if plan.time else ""
        if plan.action in ("run", "resume") and not plan.time:
            basis = f"no {graph[plan.stage].config.kind} has run in these folders"
        table.add_row(plan.stage, plan.action, plan.reason, duration(plan.time.seconds) if plan.time else "", basis)
    console().print(table)
    active = [plan for plan in plans if plan.action in ("run", "resume")]
    if not active:
        show("nothing would run")
        return
    known = [plan.time.seconds for plan in active if plan.time]
    text = f"{plural(len(active), 'stage')} would run"
    if known:
        text += f", about {duration(sum(known))}"
    if known and len(known) < len(active):
        text += f" without the {plural(len(active) - len(known), 'stage')} of unknown time"
    show(f"{text}; nothing was run")
