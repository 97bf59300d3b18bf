"""`alma sweep`: runs the members of a sweep (sweep_plan.py) one after another, and shows what each measured.

Its folder has sweep.json and sweep.md with every member, and sweep.html with a plot of the metric over each key. They
are written after each member, so that a sweep can be looked at while it goes on; the same command continues it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.checks.tables import console, new_table
from pipeline.core import chain
from pipeline.core.errors import Problems, UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.graph import check, nodes
from pipeline.core.launch import StageFailed
from pipeline.core.optional_packages import install_line, is_installed
from pipeline.core.terminal import plural, say, show
from pipeline.manage.sweep_plan import Member, SweepPlan, own_recipe
from pipeline.report.differences import numbers_in

# Of the last stage of a member: the first of these that it measured is compared.
METRICS = ("heldout_loss", "heldout_bits_per_byte", "heldout_reward", "heldout_accuracy", "heldout_rule")
LOWEST = ("loss", "bits_per_byte", "perplexity", "kl", "seconds")


@dataclass(frozen=True)
class Result:
    """A member, and what came of it."""

    name: str
    values: dict[str, str]
    state: str
    """done, failed, or not run."""
    folder: str
    numbers: dict[str, float]
    """STAGE.NUMBER -> value, of all stages that it ran."""
    message: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class Metric:
    """What members are compared by."""

    name: str
    """STAGE.NUMBER."""
    is_highest: bool
    """Whether the best is the highest."""


def run(plan: SweepPlan, wanted: str | None, highest: bool | None) -> list[Result]:
    """Run what is not up to date. wanted: the metric, STAGE.NUMBER; highest: whether it is best when highest. A member
    that fails is reported, and the others go on. Returns the results, best first. Raises UserError."""
    _check_metric(plan, wanted)
    _check_members(plan)
    outputs: dict[str, Path] = {}
    if plan.shared:
        say(f"sweep: {', '.join(plan.shared)}: the same in all members")
        graph = chain.run(plan.base, plan.shared)
        outputs = {name: graph[name].output.path for name in plan.shared}
    results = {member.name: _waiting(plan, member) for member in plan.members}
    for number, member in enumerate(plan.members, 1):
        values = ", ".join(f"{key}={value}" for key, value in member.values.items())
        say(f"sweep: member {number} of {len(plan.members)}: {values}")
        results[member.name] = _run_member(plan, member, outputs)
        write(plan, list(results.values()), _metric(plan, list(results.values()), wanted, highest))
    found = list(results.values())
    metric = _metric(plan, found, wanted, highest)
    return ranked(found, metric)


def _check_members(plan: SweepPlan) -> None:
    """Check what the recipes of all members alone show, before the first one runs. Raises UserError with all
    mistakes."""
    problems = Problems()
    for member in plan.members:
        graph = nodes(member.recipe)
        for name in plan.varied:
            with problems.gather():
                check(graph[name], graph)
    problems.refuse()


def _waiting(plan: SweepPlan, member: Member) -> Result:
    return Result(member.name, member.values, "not run", str(member.recipe.root), {})


def _run_member(plan: SweepPlan, member: Member, outputs: dict[str, Path]) -> Result:
    folder = str(member.recipe.root)
    try:
        graph = chain.run(own_recipe(plan, member, outputs), plan.varied)
    except StageFailed as failure:
        say(f"sweep: {member.name}: {failure}")
        return Result(member.name, member.values, "failed", folder, {}, f"{failure.stage}: {failure.text or 'refused'}")
    except UserError as error:
        say(f"sweep: {member.name}: {error}")
        return Result(member.name, member.values, "failed", folder, {}, str(error))
    numbers = {}
    for name in plan.varied:
        output = graph[name].output
        for key, value in numbers_in(output.manifest["metrics"]).items():
            numbers[f"{name}.{key}"] = value
    return Result(member.name, member.values, "done", folder, numbers)


# ---- the metric ------------------------------------------------------------------------------------------------------


def _check_metric(plan: SweepPlan, wanted: str | None) -> None:
    if wanted is None:
        return
    stage = wanted.partition(".")[0]
    if stage not in plan.varied or "." not in wanted:
        raise UserError(
            f"--metric {wanted}: expected STAGE.NUMBER of a stage that members run ({', '.join(plan.varied)}), such as"
            f" {plan.varied[-1]}.heldout_loss"
        )


def _metric(plan: SweepPlan, results: list[Result], wanted: str | None, highest: bool | None) -> Metric | None:
    """None until a member has measured it."""
    measured = dict.fromkeys(name for result in results for name in result.numbers)
    name = wanted
    if wanted is None:
        for stage in reversed(plan.varied):
            name = name or next((f"{stage}.{one}" for one in METRICS if f"{stage}.{one}" in measured), None)
    if name is None or name not in measured:
        return None
    is_highest = not name.rpartition(".")[2].endswith(LOWEST) if highest is None else highest
    return Metric(name, is_highest)


def ranked(results: list[Result], metric: Metric | None) -> list[Result]:
    """Best first; those without the metric last, in their order."""
    if metric is None:
        return results
    with_metric = [result for result in results if metric.name in result.numbers]
    with_metric.sort(key=lambda result: result.numbers[metric.name], reverse=metric.is_highest)
    return with_metric + [result for result in results if metric.name not in result.numbers]


# ---- what is written and shown ---------------------------------------------------------------------------------------


def write(plan: SweepPlan, results: list[Result], metric: Metric | None) -> None:
    """sweep.json, sweep.md and, if plotly is installed, sweep.html."""
    ordered = ranked(results, metric)
    content = {
        "recipe": plan.recipe,
        "fixed": plan.fixed,
        "axes": [axis.key for axis in plan.axes],
        "metric": asdict(metric) if metric else None,
        "members": [asdict(result) for result in ordered],
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / "sweep.json", content)
    write_atomic(plan.folder / "sweep.md", table(plan, ordered, metric))
    if is_installed("plotly"):
        from pipeline.report.sweep_page import sweep_page

        write_atomic(plan.folder / "sweep.html", sweep_page(content, str(plan.folder), plan.base.name))


def _rows(plan: SweepPlan, results: list[Result], metric: Metric | None) -> tuple[list[str], list[list[str]]]:
    keys = [axis.key for axis in plan.axes]
    columns = [*keys, metric.name if metric else "metric", "state", "run"]
    rows = []
    for result in results:
        value = result.numbers.get(metric.name) if metric else None
        state = f"{result.state}: {result.message}" if result.message else result.state
        cells = [result.values[key] for key in keys]
        rows.append([*cells, "" if value is None else f"{value:.5g}", state, result.name])
    return columns, rows


def table(plan: SweepPlan, results: list[Result], metric: Metric | None) -> str:
    """Markdown, best first."""
    columns, rows = _rows(plan, results, metric)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |")
    return "\n".join([f"# Sweep of {plan.recipe}", "", *lines, ""])


def show_results(plan: SweepPlan, results: list[Result], wanted: str | None, highest: bool | None) -> None:
    metric = _metric(plan, results, wanted, highest)
    columns, rows = _rows(plan, results, metric)
    shown = new_table(*columns, text=(*columns[:-3], "state", "run"))
    for row in rows:
        shown.add_row(*row)
    console().print(shown)
    done = [result for result in results if result.state == "done"]
    if metric is None and done:
        names = dict.fromkeys(name for result in done for name in result.numbers)
        show(f"no metric to compare by; give --metric, one of {', '.join(names)}")
    elif metric is not None:
        best = results[0]
        words = " ".join(f"{key}={value}" for key, value in best.values.items())
        direction = "highest" if metric.is_highest else "lowest"
        show(f"{direction} {metric.name}: {best.numbers[metric.name]:.5g} with {words}")
        if len(done) > 2:
            show("the best of several is a little better than it would be in another run: repeat it with another seed")
    page = "sweep.html" if is_installed("plotly") else f"no plot without plotly: {install_line('plotly')}"
    show(f"{plan.folder}: sweep.json, sweep.md, {page}; {plural(len(done), 'member')} of {len(results)} done")


def show_plan(plan: SweepPlan) -> None:
    """What would run (`--dry-run`)."""
    keys = [axis.key for axis in plan.axes]
    shown = new_table(*keys, "run", text=(*keys, "run"))
    for member in plan.members:
        shown.add_row(*(member.values[key] for key in keys), member.name)
    console().print(shown)
    if plan.shared:
        show(f"run once, as {plan.base.root}: {', '.join(plan.shared)}")
    show(f"run by each of {plural(len(plan.members), 'member')}: {', '.join(plan.varied)}; nothing was run")
