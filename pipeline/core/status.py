"""Which stages are up to date, which are not, and why: each stage is compared with what is published."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.changes import explain, record
from pipeline.core.config import dump, identity
from pipeline.core.errors import Absent, Damaged, UserError
from pipeline.core.files import sha256_file
from pipeline.core.fingerprint import Recorded, fingerprint_of
from pipeline.core.graph import Node, accepts, nodes
from pipeline.core.lock import describe_holder, lock_holder
from pipeline.core.partial_runs import partials, restarting, run_info, worth_keeping
from pipeline.core.recipe import Recipe, module_of


def examine(recipe: Recipe) -> dict[str, Node]:
    """Every stage with its state and, in words, the reason."""
    graph = nodes(recipe)
    for node in graph.values():
        examine_one(node, graph)
    mark_absent(graph)
    return graph


def mark_absent(graph: dict[str, Node]) -> set[str]:
    """Give the state `absent` to stages that have no output here, cannot be given one, and need none, since what was
    made from them is up to date as of its run. Returns their names."""
    absent: set[str] = set()
    for name, node in reversed(graph.items()):
        children = [child for child in graph.values() if name in child.parents.values()]
        if node.unavailable and any(child.state == "up to date" or child.name in absent for child in children):
            absent.add(name)
            node.state = "absent"
    return absent


def examine_one(node: Node, graph: dict[str, Node], running: bool = True) -> None:
    """Fill in inputs, identity, state and reason; parents have been examined. Without `running` a stage that is
    being written is judged by what it has published."""
    holder = lock_holder(node.folder) if running else None
    # a holder that a start of the stage would wait for is no reason not to start it
    writer = holder if holder and not holder["dead"] and not holder["waits"] else None
    node.inputs, node.absent, node.output, node.state, node.reason = {}, [], None, "missing", ""
    try:
        _examine(node, graph)
    except Damaged as error:
        node.state, node.reason, node.output = "damaged", str(error), None
    except UserError as error:  # sources or inputs that cannot be used; who runs the stage is told so, too
        with contextlib.suppress(Damaged):
            node.output = artifact.current(node.folder)
        node.state, node.reason = "stale" if node.output else "missing", str(error)
    if writer:
        node.state, node.reason = "running", describe_holder(writer)


def _examine(node: Node, graph: dict[str, Node]) -> None:
    """State and reason of a stage; what cannot be read or used is raised as a UserError."""
    for source in node.parents.values():
        if source in graph and graph[source].state != "up to date" and not graph[source].unavailable:
            parent = graph[source]
            present = artifact.current(node.folder)
            node.state = "stale" if present else "waits"
            node.reason = f"{source} {'waits too' if parent.state == 'waits' else f'is {parent.state}'}"
            node.output = present
            break
    else:
        try:
            find_inputs(node, graph)
        except Absent as error:
            node.output = artifact.current(node.folder)
            node.state, node.reason = "stale" if node.output else "missing", "; ".join(error.lines)
        else:
            _compare(node, graph)


def as_run(node: Node, graph: dict[str, Node]) -> dict:
    """What run.json would say of a run of this stage now."""
    return {"identity": node.identity, "config": dump(node.config), "parents": records(node, graph)}


def records(node: Node, graph: dict[str, Node]) -> dict[str, dict]:
    """What a stage's manifest says of its inputs."""
    return {key: record(found, node.folder, node.parents[key] not in graph) for key, found in node.inputs.items()}


def find_inputs(node: Node, graph: dict[str, Node]) -> None:
    """Fill in inputs and identity of a stage whose parents are up to date.

    Where sources, folders or parents are not on this machine, a published output of which all else is as the recipe
    has it stands for them, and `absent` names them. Raises Absent where there is none.
    """
    lacking: dict[str, Absent] = {}
    for key, source in node.parents.items():
        if source in graph and graph[source].unavailable:
            lacking[key] = Absent(f"inputs.{key}: {source} is not on this machine: {graph[source].reason}")
        elif source in graph:
            node.inputs[key] = graph[source].output
        else:
            try:
                node.inputs[key] = artifact.external(key, Path(source), accepts(node, key))
            except Absent as error:
                lacking[key] = error
    try:
        if lacking:
            raise next(iter(lacking.values()))
        node.identity = identity_of(node)
        return
    except Absent as error:
        reason = error
    for published in artifact.published(node.folder):
        node.absent = []
        try:
            node.identity = identity_of(node, published.manifest["identity"])
        except Absent:
            continue
        if fingerprint_of(node.identity) == published.fingerprint:
            return
    node.identity, node.absent = None, reason.lines
    raise reason


def _compare(node: Node, graph: dict[str, Node]) -> None:
    """State of a stage whose parents are all up to date."""
    fingerprint = fingerprint_of(node.identity)
    published = artifact.current(node.folder)
    partial = node.folder / f"{fingerprint[:12]}.partial"
    again = restarting(partial)
    if (published is None or published.fingerprint != fingerprint) and not again:
        same = artifact.read(node.folder / fingerprint[:12])  # an earlier recipe's output is kept, and serves again
        if same and same.fingerprint == fingerprint and not same.damage():
            node.state, node.output, node.reason = "up to date", same, "kept from an earlier run"
            _say_what_is_absent(node)
            return
    if published and published.fingerprint == fingerprint and not again:
        node.output = published
        damage = published.damage()
        node.state, node.reason = ("damaged", damage) if damage else ("up to date", "")
        _say_what_is_absent(node)
    elif (partial / "run.json").exists():
        steps = sorted(path.parent.name for path in partial.glob("checkpoints/step-*/complete.json"))
        node.state = "interrupted"
        node.reason = f"at step {int(steps[-1].removeprefix('step-'))}" if steps else "before its first checkpoint"
    elif published:
        node.output = published
        node.state, node.reason = "stale", "; ".join(_changes(node, graph, published.manifest))
    elif others := [path for path in partials(node.folder) if worth_keeping(path)]:
        changed = _changes(node, graph, run_info(others[-1]))
        node.reason = f"{others[-1].name} was made by another recipe: {'; '.join(changed)}"


def _changes(node: Node, graph: dict[str, Node], before: dict) -> list[str]:
    """What changed since a run, as its manifest.json or run.json has it."""
    return explain(node.folder, before, as_run(node, graph))


def _say_what_is_absent(node: Node) -> None:
    if node.absent and node.state == "up to date":
        kept = f"{node.reason}, " if node.reason else ""
        node.reason = f"{kept}as of its run; not on this machine: {', '.join(node.absent)}"


def identity_of(node: Node, recorded: dict | None = None) -> dict:
    """What decides the result of a stage: its identity keys, its kind's version, its sources' contents, its parents'
    contents. What is not on this machine counts as `recorded` has it, the identity of an earlier run, or raises
    Absent."""
    module = module_of(node.config.kind)
    config = identity(node.config)
    config.pop("inputs", None)  # parents count by what they hold, not by what they are called
    parents = {key: parent.digest for key, parent in node.inputs.items()}
    for key in node.parents:
        if key not in parents:
            if recorded is None or key not in recorded["parents"]:
                raise Absent(f"inputs.{key}: {node.parents[key]} is not on this machine")
            parents[key] = recorded["parents"][key]
            node.absent.append(f"inputs.{key}")
    value = {"kind": node.config.kind, "version": module.VERSION, "config": config, "parents": parents}
    sources = source_identity(node, recorded and recorded.get("sources", {}))
    if sources:
        value["sources"] = sources
        config.pop("sources", None)
        config.pop("shards", None)
        config.pop("adopt", None)
    return value


def source_identity(node: Node, recorded: dict | None = None) -> dict | None:
    """What the sources of a stage hold. One that is not on this machine counts as `recorded` has it, the `sources` of
    an earlier identity, and is noted in node.absent; without, Absent is raised."""
    from pipeline.data.sources.sources import identify

    def earlier(entries: dict) -> Recorded | None:
        return None if recorded is None else Recorded(entries, node.absent)

    known, cache = recorded or {}, node.folder.parent / ".hashes.json"
    if hasattr(node.config, "outside"):  # files that a stage takes over, such as a tokenizer
        return _hashed("@outside", "adopt", node.config.outside, known, node.absent)
    if shards := getattr(node.config, "shards", None):
        from pipeline.data.tokens.import_shards import identify as identify_shards

        return identify_shards(shards, cache, earlier(known))
    if not getattr(node.config, "sources", None):
        return None
    found = identify(node.config.sources, cache, recorded=earlier(known))
    if getattr(node.config, "decontaminate", None):
        prefix = "decontaminate."
        before = {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}
        sets = identify(node.config.decontaminate.sets, cache, "decontaminate.sets", earlier(before))
        found |= {f"{prefix}{name}": value for name, value in sets.items()}
    if examples := getattr(node.config, "examples", {}):
        found["@examples"] = identify(examples, cache, "examples", earlier(known.get("@examples", {})))
    if hasattr(node.config, "lists"):  # block lists and the like: they count by what they hold
        found |= _hashed("@lists", "block", lambda: node.config.lists, known, node.absent) or {}
    return found


def _hashed(key: str, shown: str, paths: Callable[[], list], recorded: dict, absent: list[str]) -> dict | None:
    """{key: [[name, sha256], ...]} of the files that `paths` gives, or None if there are none."""
    try:
        listed = [[Path(path).name, sha256_file(Path(path).expanduser())] for path in paths()]
    except Absent:
        if key not in recorded:
            raise
        listed = recorded[key]
        absent.append(shown)
    return {key: listed} if listed else None
