"""Which stages are up to date, which are not, and why: each stage is compared with what is published."""

import contextlib

from pipeline.core import artifact, external_inputs
from pipeline.core.changes import explain, record
from pipeline.core.checkpoint_folder import newest_step
from pipeline.core.config import dump
from pipeline.core.errors import Absent, Damaged, UserError
from pipeline.core.fingerprint import ExternalContent, fingerprint_of, identity_of
from pipeline.core.graph import Node, accepted_kinds, nodes
from pipeline.core.lock import describe_holder, lock_holder
from pipeline.core.partial_runs import partials, restarting, run_info, worth_keeping
from pipeline.core.recipe import Recipe, module_of


def examine(recipe: Recipe) -> dict[str, Node]:
    """Every stage with its state and the reason for it."""
    graph = nodes(recipe)
    for node in graph.values():
        examine_one(node, graph)
    mark_absent(graph)
    return graph


def mark_absent(graph: dict[str, Node]) -> set[str]:
    """Give the state `absent` to stages that have no output here and cannot be run here, but are not needed either,
    because what was made from them is up to date as of its run. Returns their names."""
    absent: set[str] = set()
    for name, node in reversed(graph.items()):
        children = [child for child in graph.values() if name in child.parents.values()]
        if node.unavailable and any(child.state == "up to date" or child.name in absent for child in children):
            absent.add(name)
            node.state = "absent"
    return absent


def examine_one(node: Node, graph: dict[str, Node], running: bool = True) -> None:
    """Fill in inputs, identity, state and reason of a stage whose parents have been examined. Without `running`, a
    stage that is being written is judged by what it has published."""
    holder = lock_holder(node.folder) if running else None
    # A start of the stage would wait for a holder that "waits", so that one does not keep it from starting.
    writer = holder if holder and not holder["dead"] and not holder["waits"] else None
    node.inputs, node.absent, node.output, node.state, node.reason = {}, [], None, "missing", ""
    try:
        _examine(node, graph)
    except Damaged as error:
        node.state, node.reason, node.output = "damaged", error.problem, None
    except UserError as error:  # sources or inputs that cannot be used; running the stage reports it, too
        with contextlib.suppress(Damaged):
            node.output = artifact.current(node.folder)
        node.state, node.reason = "stale" if node.output else "missing", str(error)
    if writer:
        node.state, node.reason = "running", describe_holder(writer)


def _examine(node: Node, graph: dict[str, Node]) -> None:
    """State and reason of a stage. Raises UserError for what cannot be read or used."""
    for source in node.parents.values():
        parent = graph.get(source)
        if parent and parent.state != "up to date" and not parent.unavailable:
            node.output = artifact.current(node.folder)
            node.state = "stale" if node.output else "waits"
            node.reason = f"{source} waits too" if parent.state == "waits" else f"{source} is {parent.state}"
            return
    try:
        find_inputs(node, graph)
    except Absent as error:
        node.output = artifact.current(node.folder)
        node.state, node.reason = "stale" if node.output else "missing", "; ".join(error.lines)
        return
    _compare(node, graph)


def as_run(node: Node, graph: dict[str, Node]) -> dict:
    """What run.json would say of a run of this stage now."""
    return {"identity": node.identity, "config": dump(node.config), "parents": records(node, graph)}


def records(node: Node, graph: dict[str, Node]) -> dict[str, dict]:
    """What a stage's manifest says of its inputs."""
    described = {}
    for key, parent in node.inputs.items():
        made_elsewhere = node.parents[key] not in graph
        described[key] = record(parent, node.folder, made_elsewhere)
    return described


def find_inputs(node: Node, graph: dict[str, Node]) -> None:
    """Fill in inputs and identity of a stage whose parents are up to date.

    Where sources, folders or parents are not on this machine, a published output that was made from the same of
    everything else counts as made from them, too, and `absent` names them. Raises Absent if there is no such output.
    """
    missing: list[str] = []
    for key, source in node.parents.items():
        parent = graph.get(source)
        if parent and parent.unavailable:
            missing.append(f"inputs.{key}: {source} is not on this machine: {parent.reason}")
        elif parent:
            node.inputs[key] = parent.output
        else:
            try:
                node.inputs[key] = external_inputs.read(key, source, accepted_kinds(node, key))
            except Absent as error:
                missing += error.lines
    try:
        if missing:
            raise Absent(*missing)
        node.identity, node.absent = _identity(node)
        return
    except Absent as error:
        reason = error
    for published in artifact.published(node.folder):
        try:
            node.identity, node.absent = _identity(node, published.manifest["identity"])
        except Absent:
            continue
        if fingerprint_of(node.identity) == published.fingerprint:
            return
    node.identity, node.absent = None, reason.lines
    raise reason


def _identity(node: Node, recorded: dict | None = None) -> tuple[dict, list[str]]:
    """What decides the result of a stage, and the keys of what is not on this machine. That counts as `recorded` has
    it, the identity of an earlier run, or raises Absent."""
    absent: list[str] = []
    parents = {key: parent.digest for key, parent in node.inputs.items()}
    for key in node.parents:
        if key in parents:
            continue
        if recorded is None or key not in recorded["parents"]:
            raise Absent(f"inputs.{key}: {node.parents[key]} is not on this machine")
        parents[key] = recorded["parents"][key]
        absent.append(f"inputs.{key}")
    content = ExternalContent(node.hash_cache, recorded and recorded.get("sources", {}))
    external, dropped = content.of(node.config)
    version = module_of(node.config.kind).VERSION
    return identity_of(node.config, version, parents, external, dropped), absent + content.absent


def _compare(node: Node, graph: dict[str, Node]) -> None:
    """State of a stage whose parents are all up to date."""
    fingerprint = fingerprint_of(node.identity)
    published = artifact.current(node.folder)
    partial = node.folder / f"{fingerprint[:12]}.partial"
    being_replaced = restarting(partial)
    is_current = published is not None and published.fingerprint == fingerprint
    if not is_current and not being_replaced:
        kept = artifact.read(node.folder / fingerprint[:12])  # the output of an earlier recipe that was the same
        if kept and kept.fingerprint == fingerprint and not kept.damage():
            node.output = kept
            _set_up_to_date(node, "kept from an earlier run")
            return
    if is_current and not being_replaced:
        node.output = published
        damage = published.damage()
        if damage:
            node.state, node.reason = "damaged", damage
        else:
            _set_up_to_date(node)
    elif (partial / "run.json").exists():
        step = newest_step(partial)
        node.state = "interrupted"
        node.reason = f"at step {step}" if step else "before its first checkpoint"
    elif published:
        node.output = published
        node.state, node.reason = "stale", "; ".join(_changes(node, graph, published.manifest))
    elif others := [path for path in partials(node.folder) if worth_keeping(path)]:
        changes = _changes(node, graph, run_info(others[-1]))
        node.reason = f"{others[-1].name} was made by another recipe: {'; '.join(changes)}"


def _changes(node: Node, graph: dict[str, Node], before: dict) -> list[str]:
    """What changed since a run. before: its manifest.json or run.json."""
    return explain(node.folder, before, as_run(node, graph))


def _set_up_to_date(node: Node, reason: str = "") -> None:
    node.state, node.reason = "up to date", reason
    if node.absent:
        as_of = f"as of its run; not on this machine: {', '.join(node.absent)}"
        node.reason = f"{reason}, {as_of}" if reason else as_of
