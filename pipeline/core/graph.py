"""The graph of a recipe: its stages, what each one reads, what decides its result, and which are out of date and why.

`nodes` gives the stages in order, `check` says what their recipe alone tells of them, `examine` compares each with what
is published. Running them is pipeline/core/chain.py's.
"""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.changes import explain, record
from pipeline.core.errors import Absent, Damaged, Problems, UserError
from pipeline.core.files import sha256_file
from pipeline.core.fingerprint import Recorded, fingerprint_of
from pipeline.core.lock import describe_holder, lock_holder
from pipeline.core.recipe import Recipe, StageConfig, dump, identity, module_of
from pipeline.core.recipe_file import shown
from pipeline.core.unfinished import partials, restarting, run_info, worth_keeping


@dataclass
class Node:
    """A stage in its chain. `state` is one of: up to date, stale, interrupted, missing, damaged, waits, running, and
    absent: without output and sources on this machine, which nothing needs."""

    name: str
    config: StageConfig
    parents: dict[str, str]  # input -> stage name, or path of an outside folder
    folder: Path
    inputs: dict[str, Artifact] = field(default_factory=dict)
    identity: dict | None = None
    output: Artifact | None = None
    state: str = "missing"
    reason: str = ""
    absent: list[str] = field(default_factory=list)
    """Sources and inputs that are not on this machine: the stage cannot be run here."""

    @property
    def unavailable(self) -> bool:
        """Whether the stage has no output here and cannot be given one."""
        return bool(self.absent) and self.output is None


def nodes(recipe: Recipe, problems: Problems | None = None) -> dict[str, Node]:
    """Stages in an order in which parents come first. Raises UserError for inputs that cannot be had; with `problems`
    they are added there instead."""
    gathered = Problems() if problems is None else problems
    found: dict[str, Node] = {}
    for name, config in recipe.stages.items():
        found[name] = Node(name, config, _parents(recipe, name, config, gathered), recipe.root / name)
    if problems is None:
        gathered.refuse()
    ordered: dict[str, Node] = {}
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in trail:
            circle = " -> ".join([*trail[trail.index(name) :], name])
            raise UserError(recipe.located(name, f"stages.{name}.inputs: inputs go round in a circle: {circle}"))
        trail.append(name)
        for parent in found[name].parents.values():
            if parent in found:
                visit(parent)
        trail.pop()
        ordered[name] = found[name]

    for name in found:
        visit(name)
    return ordered


def _parents(recipe: Recipe, name: str, config: StageConfig, problems: Problems) -> dict[str, str]:
    """Input -> stage. `INPUTS` of a kind: name -> kinds it accepts; `name?` may be absent; `*` takes any number, by
    default all earlier ones."""
    wanted = dict(module_of(config.kind).INPUTS)
    anything = wanted.pop("*", ())
    optional = {key.removesuffix("?") for key in wanted if key.endswith("?")}
    wanted = {key.removesuffix("?"): kinds for key, kinds in wanted.items()}
    earlier = list(recipe.stages)[: list(recipe.stages).index(name)]
    parents: dict[str, str] = {}
    for key, source in config.inputs.items():
        kinds = wanted.get(key, anything)
        wrong = _wrong_input(recipe, name, key, source, kinds, list(wanted))
        if wrong:
            problems.add(recipe.located(name, wrong))
        elif source not in recipe.broken:
            parents[key] = source
    for key, kinds in wanted.items():
        if key in parents or key in optional or key in config.inputs:
            continue
        nearest = [stage for stage in earlier if recipe.stages[stage].kind in kinds]
        if nearest:
            parents[key] = nearest[-1]
        elif key not in config.optional() and not recipe.broken:  # a stage whose keys are wrong may be the one
            problems.add(
                recipe.located(
                    name,
                    f"stages.{name}: needs the input {key!r}, a stage of kind {' or '.join(kinds)}, and none stands"
                    f" before it; add one or give inputs.{key}",
                )
            )
    if anything and not set(parents) - set(wanted):
        parents.update(
            {stage: stage for stage in earlier if recipe.stages[stage].kind in anything and stage not in parents}
        )
    return parents


def _wrong_input(
    recipe: Recipe, name: str, key: str, source: str, kinds: tuple[str, ...], takes: list[str]
) -> str | None:
    """What is wrong with an input that the recipe names, or None."""
    if not kinds:
        kind = recipe.stages[name].kind
        return f"stages.{name}.inputs: {kind} has no input {key!r}; it takes {', '.join(takes) or 'none'}"
    if source.startswith((".", "/")) or source in recipe.broken:
        return None
    if source not in recipe.stages or source == name:
        return (
            f"stages.{name}.inputs.{key}: {shown(source)} is no other stage of this recipe; it has"
            f" {', '.join(s for s in recipe.stages if s != name)} (the path of a folder begins with . or /)"
        )
    if recipe.stages[source].kind not in kinds:
        return (
            f"stages.{name}.inputs.{key}: stage {source!r} is of kind {recipe.stages[source].kind}, expected"
            f" {' or '.join(kinds)}"
        )
    return None


def check(node: Node, graph: dict[str, Node]) -> None:
    """What can be told of a stage from its recipe alone. Raises UserError with all that is wrong."""
    problems = Problems()
    with problems.gather():
        node.config.check(node.config.run.world)
    if node.config.kind == "tokenizer" and node.config.weights and node.parents.get("data") in graph:
        there = graph[node.parents["data"]].config.sources
        for source in node.config.weights:
            if source not in there:
                problems.add(
                    f"stages.{node.name}.weights: its text has no source {source!r}; it has {', '.join(sorted(there))}"
                )
    known = _packed_sources(node, graph)
    mixtures = [
        ("mixture", getattr(node.config, "mixture", None) or {}),
        *(("mixture_changes", change.mixture) for change in getattr(node.config, "mixture_changes", [])),
    ]
    for key, source in [(key, source) for key, mixture in mixtures for source in mixture] if known else []:
        if source not in known:
            problems.add(
                f"stages.{node.name}.{key}: its text has no source {source!r}; it has {', '.join(sorted(known))}"
            )
    for key, source in node.parents.items():
        with problems.gather():
            _check_parent(node, key, source, graph)
    problems.refuse()


def _check_parent(node: Node, key: str, source: str, graph: dict[str, Node]) -> None:
    if source not in graph and (not os.path.isdir(source) or not os.listdir(source)):
        raise UserError(f"stages.{node.name}.inputs.{key}: {shown(source)} is not a folder with files in it")
    wanted = getattr(node.config, "sequence_length", None)
    if not wanted or not _reads_rows(node, key):
        return
    longest = model_positions(source, graph)
    pretrains = node.config.kind == "pretrain"
    if longest and wanted > longest and not (pretrains and "rope_parameters" in node.config.model_changes):
        if source in graph:
            found = f"{wanted} tokens are more than the {longest} positions that {source} gives its model"
        else:
            found = f"{wanted} is more than the {longest} positions of the model in {shown(source)}"
        raise UserError(
            f"stages.{node.name}.sequence_length: {found}; use {longest} or fewer, or a model that was pretrained with"
            " more" + " (or scale positions, model_changes: {rope_parameters: ...})" * pretrains
        )


def _reads_rows(node: Node, key: str) -> bool:
    """Does this stage give rows of its sequence_length to the model behind this input?"""
    if node.config.kind == "assess":
        return key not in ("tokens", "reward") and "tokens" in node.parents and node.config.max_rows > 0
    return key in ("model", "policy", "reward")


def model_positions(source: str, graph: dict[str, Node]) -> int | None:
    """Most tokens of a row that the model of a stage, or of an outside folder, has positions for; None for any number,
    or if it cannot be told. Pretraining decides it (its sequence_length), and what comes after keeps it."""
    from pipeline.models.families import FAMILIES, UNKNOWN

    if source not in graph:
        return _folder_positions(Path(source))
    config, parents = graph[source].config, graph[source].parents
    above = parents.get("model") or parents.get("policy")
    if config.kind != "pretrain":
        return model_positions(above, graph) if above else None
    if above is None:
        family = FAMILIES.get((config.model or {}).get("family"), UNKNOWN)
        return None if family.unlimited_positions else config.sequence_length
    before = model_positions(above, graph)
    return max(before, config.sequence_length) if before else None


def _folder_positions(path: Path) -> int | None:
    from transformers import AutoConfig

    from pipeline.models.families import positions

    folder = path / "model" if (path / "model").is_dir() else path
    try:
        made = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # the stage itself says what is wrong with it
        return None
    return positions(made.get_text_config())


def _packed_sources(node: Node, graph: dict[str, Node]) -> list[str]:
    """Names of the sources in the tokens that a stage reads, as far as they can be told before they are made."""
    tokens = node.parents.get("tokens")
    if tokens in graph:
        data, shards = graph[tokens].parents.get("data"), list(getattr(graph[tokens].config, "shards", {}))
        return [*graph[data].config.sources, *shards] if data in graph else shards if data is None else []
    try:
        return list(json.loads((Path(tokens or "") / "index.json").read_text())["splits"]["train"])
    except (OSError, ValueError, KeyError):  # the stage itself says what is wrong with it
        return []


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


def accepts(node: Node, key: str) -> tuple[str, ...]:
    wanted = module_of(node.config.kind).INPUTS
    return wanted.get(key) or wanted.get(f"{key}?") or wanted.get("*", ())


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


def ancestors(graph: dict[str, Node], names: list[str]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [parent for parent in graph[name].parents.values() if parent in graph]
    return found
