"""The chain: running the stages of a recipe in order (pipeline/core/graph.py says which are out of date).

A stage script ends in `chain.main("pretrain")`; `alma run` starts the same scripts one after another, so that a stage
run by hand, by a launcher or by the chain goes through the same few lines (`run_stage`).
"""

import argparse
import contextlib
import errno
import io
import os
import signal
import socket
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.closing import result, shown_path
from pipeline.core.errors import EXIT_STOPPED, EXIT_USER, Problems, Stopped, UserError
from pipeline.core.files import read_record, write_atomic
from pipeline.core.graph import (
    Node,
    accepts,
    ancestors,
    as_run,
    check,
    examine_one,
    find_inputs,
    mark_absent,
    nodes,
    records,
    source_identity,
)
from pipeline.core.output import Output, link, tidy
from pipeline.core.precheck import check_sources
from pipeline.core.processes import Ranks, die_with_launcher, signals_held
from pipeline.core.recipe import Recipe, dump, load, module_of
from pipeline.core.streams import keep_open
from pipeline.core.terminal import show
from pipeline.core.unfinished import NothingToFork, fork_source

# What a machine can refuse, and what its user can do.
MACHINE = {
    errno.ENOSPC: "make room or give another `output`",
    errno.EDQUOT: "make room or give another `output`",
    errno.EROFS: "give an `output` that can be written",
    errno.EACCES: "give an `output` that can be written",
    errno.EPERM: "give an `output` that can be written",
    errno.ENOTDIR: "give an `output` that is a folder",
    errno.EEXIST: "give an `output` that is a folder",
}


# ---- running one stage -----------------------------------------------------------------------------------------------


def run_stage(recipe: Recipe, name: str, *, restart: bool = False, fork: bool = False) -> Artifact | None:
    """Run one stage in this process (one rank of it), or do nothing if its output is up to date. Returns the output
    on the main rank."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _writable(recipe)
    graph = nodes(recipe)
    node = graph[name]
    if node.config.run.threads:
        os.environ["OMP_NUM_THREADS"] = str(node.config.run.threads)
    node.config.check(world)
    for ancestor in [graph[other] for other in graph if other in ancestors(graph, [name]) - {name}]:
        examine_one(ancestor, graph, running=False)
    for source in node.parents.values():
        parent = graph.get(source)
        if parent is None or parent.state == "up to date" or parent.unavailable:
            continue
        if parent.state in ("missing", "waits"):
            raise UserError(
                f"stage {name} needs the output of {source} ({recipe.root / source}/current), which does not exist; run"
                " that stage first, or the chain: alma run"
            )
        raise UserError(
            f"stage {name} needs the output of {source}, which is {parent.state}: {parent.reason}; run {source}"
            " first, or the chain: alma run"
        )
    find_inputs(node, graph)
    if node.absent:  # what is published stands for them; nothing can be made again
        examine_one(node, graph, running=False)
        if restart or node.state != "up to date":
            raise UserError(
                f"stage {name} cannot be run again: not on this machine: {', '.join(node.absent)}; {node.reason}"
            )
        say(f"{name}: up to date ({node.reason})", rank)
        return node.output
    output = Output(node.folder, name, node.config.kind, node.identity, is_main=rank == 0)
    output.open(config=dump(node.config), parents=records(node, graph), restart=restart, fork=fork)
    try:
        if output.published:
            say(f"{name}: up to date ({shown_path(output.published)})", rank)
            return output.published
        if rank == 0:
            write_atomic(output.path / "recipe.yaml", _resolved(recipe))
        return _work(node, output, rank, world)
    except UserError as error:
        output.end_with_error(str(error))
        raise
    finally:
        output.close()


def _published(output: Output, metrics: dict) -> Artifact:
    artifact = output.publish(metrics)
    say(result(artifact))
    return artifact


def _work(node: Node, output: Output, rank: int, world: int) -> Artifact | None:
    """Do the work of a stage and publish it. Whatever ends it early leaves word of why."""
    from pipeline.train.stop import leave_word, outside, saved_step

    module = module_of(node.config.kind)
    if not hasattr(node.config, "watch"):
        with outside(output, module.KEPT):
            return _published(output, module.run(node.config, node.inputs, output))
    from pipeline.train.heartbeat import Watch

    with outside(output):
        try:
            with Watch(output, node.config.watch):
                metrics = module.run(node.config, node.inputs, output)
        except Exception as error:
            if world > 1 and not isinstance(error, UserError):
                message = f"rank {rank} failed: {type(error).__name__}: {error}"
                leave_word(output, "failed", saved_step(output), rank=rank, message=message)
            raise
        return _published(output, metrics) if rank == 0 else None


def _resolved(recipe: Recipe) -> str:
    """The recipe with everything written out, in its order (the order of stages decides their default inputs)."""
    buffer = io.StringIO()
    YAML(typ="rt", pure=True).dump(
        {
            **dump(recipe.model_copy(update={"stages": {}})),
            "stages": {name: dump(config) for name, config in recipe.stages.items()},
        },
        buffer,
    )
    return buffer.getvalue()


def _writable(recipe: Recipe) -> None:
    try:
        recipe.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: the folder {recipe.root} cannot be made ({error.strerror}); give another `output`"
        ) from None


def say(text: str, rank: int | None = None) -> None:
    """A line for the user, from rank 0 alone."""
    if (int(os.environ.get("RANK", 0)) if rank is None else rank) == 0:
        show(text)


def main(kind: str, argv: list[str] | None = None) -> None:
    """Entry point of a stage script: `python pipeline/KIND.py recipe.yaml [--stage NAME] [--restart|--fork]
    [key=value ...]`."""
    # Before torch is loaded. Spinning threads cost a busy machine more than sleeping ones cost an idle one
    # (docs/log.md, 3).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv is None:
        keep_open()
    parser = argparse.ArgumentParser(
        prog=f"pipeline/{kind}.py", description=(module_of(kind).__doc__ or "").splitlines()[0]
    )
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a key of the recipe, such as pretrain.optimizer.lr=3e-4",
    )
    parser.add_argument("--stage", help=f"which stage of kind {kind}, if the recipe has several")
    parser.add_argument("--restart", action="store_true", help="set unfinished runs of this stage aside and begin anew")
    parser.add_argument(
        "--fork", action="store_true", help="go on from the last checkpoint of a run that another recipe made"
    )
    args = parser.parse_intermixed_args(argv)  # so that key=value words may also follow an option
    from pipeline.train import stop

    die_with_launcher()
    code = guarded(lambda: _main(kind, args))
    stop.finish()
    sys.exit(code)


def _main(kind: str, args: argparse.Namespace) -> None:
    from pipeline.train import stop

    stop.begin()  # raises Stopped if the chain was interrupted while this process was importing
    recipe = load(args.recipe, args.overrides)
    same = [name for name, config in recipe.stages.items() if config.kind == kind]
    if args.stage and args.stage not in same:
        raise UserError(
            f"{args.recipe}: --stage {args.stage}: no stage of kind {kind} has this name; there is"
            f" {', '.join(same) or 'none'}"
        )
    if not same:
        raise UserError(f"{args.recipe}: has no stage of kind {kind}; it has {', '.join(recipe.stages)}")
    if len(same) > 1 and not args.stage:
        raise UserError(
            f"{args.recipe}: has {len(same)} stages of kind {kind} ({', '.join(same)}); say which with --stage NAME"
        )
    run_stage(recipe, args.stage or same[0], restart=args.restart, fork=args.fork)


def guarded(action) -> int:
    """Run `action`; a UserError becomes one sentence on stderr and exit code 2, a stop by signal its own code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be UTF-8
    rank = int(os.environ.get("RANK", 0))
    try:
        action()
        return 0
    except UserError as error:
        if rank == 0:
            show(f"error: {error}", sys.stderr)
        else:
            time.sleep(3)  # a launcher ends all ranks when the first one leaves: rank 0 must have spoken by then
        return EXIT_USER
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        show(
            f"error: {error.filename or 'the output folder'}: {error.strerror}; {MACHINE[error.errno]}, then the same"
            " command goes on",
            sys.stderr,
        )
        return EXIT_USER
    except Stopped as stop:
        if str(stop):
            say(str(stop), rank)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        if rank == 0:
            show("interrupted; stages that were finished are kept", sys.stderr)
        return 130
    finally:
        if "torch.distributed" in sys.modules:
            from pipeline.train.distributed import shutdown

            shutdown()


# ---- running the chain -----------------------------------------------------------------------------------------------


def run(recipe: Recipe, only: list[str] = (), *, restart: bool = False, fork: bool = False) -> dict[str, Node]:
    """Bring the stages `only` (default: all) and what they need up to date, one after another. Returns the examined
    graph."""
    graph = nodes(recipe)
    for name in only:
        if name not in graph:
            raise UserError(f"recipe {recipe.name}: no stage is called {name!r}; there is {', '.join(graph)}")
    wanted = ancestors(graph, only) if only else set(graph)
    _writable(recipe)
    forced = set(only) if only else set(graph)
    absent = _refuse_early(recipe, graph, wanted, forced if restart else set(), set(only))
    if fork:
        _refuse_forks(graph, wanted - absent)
    for name, node in graph.items():
        if name not in wanted:
            continue
        if name in absent:
            say(f"{name}: {node.state} ({node.reason}); no stage needs it")
            continue
        examine_one(node, graph)
        if node.state == "running":
            raise UserError(f"{node.folder}: another run is writing here: {node.reason}; wait for it, or end it")
        again = restart and name in forced and (node.state != "up to date" or bool(only))
        if node.state == "up to date" and not again:
            if node.reason:
                link(node.folder, node.output.path)
            tidy(node.folder)
            say(f"{name}: up to date{f' ({node.reason})' if node.absent else ''}")
            continue
        say(f"{name}: {node.state}{' (' + node.reason + ')' if node.reason else ''}, running")
        _launch(node, recipe, restart=again, fork=fork and _can_fork(node, graph, named=name in only))
        examine_one(node, graph, running=False)  # another run may have started here since
        if node.state != "up to date":
            raise UserError(
                f"stage {name} finished, but is now {node.state}: {node.reason or 'its output is gone'}; another run"
                " started here, or its sources changed meanwhile: run the same command again"
            )
    return graph


def _refuse_early(
    recipe: Recipe, graph: dict[str, Node], wanted: set[str], again: set[str], named: set[str]
) -> set[str]:
    """Refuse before the first hour is spent what can be refused, of all stages that must run, in one UserError.
    Returns the stages that need not run although they have no output here. `again`: stages that are run again even if
    they are up to date; `named`: stages that the command line names."""
    problems = Problems()
    for name in graph:
        if name in wanted:
            examine_one(graph[name], graph)
    absent = mark_absent({name: node for name, node in graph.items() if name in wanted}) - named
    for name, node in graph.items():
        if name not in wanted or name in absent or node.state == "up to date" and name not in again:
            continue
        with problems.gather(lambda message, name=name: recipe.located(name, message)):
            check(node, graph)
        with problems.gather(lambda message, name=name: recipe.located(name, message)):
            if (node.config.run.nodes or 1) > 1:
                raise UserError(
                    f"stage {name} asks for {node.config.run.nodes} nodes; alma run starts processes on this machine:"
                    f" start launch/slurm/alma.sbatch, or give {name}.run.nodes=1"
                )
            if node.config.run.device == "cuda":
                from pipeline.train.distributed import choose_device

                choose_device(node.config, node.config.run.processes)
        with problems.gather(lambda message, name=name: recipe.located(name, message)):
            source_identity(node)
        for key, source in node.parents.items():
            if source not in graph:
                with problems.gather(lambda message, name=name: recipe.located(name, message)):
                    artifact.external(key, Path(source), accepts(node, key))
            if source in absent:
                problems.add(
                    recipe.located(
                        name,
                        f"stages.{name}.inputs.{key}: {source} has no output on this machine and cannot be run:"
                        f" {graph[source].reason}",
                    )
                )
    must_run = [graph[name] for name in graph if name in wanted - absent]
    check_sources(recipe, graph, [node for node in must_run if node.state != "up to date"], problems)
    problems.refuse()
    return absent


def _refuse_forks(graph: dict[str, Node], wanted: set[str]) -> None:
    """Refuse a --fork whose checkpoints cannot be used before any stage runs, where that can be told already."""
    for name, node in graph.items():
        if name in wanted and node.identity and node.state not in ("up to date", "interrupted") and _trains(node):
            with contextlib.suppress(NothingToFork):
                fork_source(node.folder, as_run(node, graph), name)


def _can_fork(node: Node, graph: dict[str, Node], named: bool) -> bool:
    """Whether --fork gives a stage that is about to run a checkpoint to continue from. Says so if not; a stage that
    the command line names, or one whose checkpoints cannot be used, is refused."""
    if node.state == "interrupted" or not _trains(node):
        return False
    try:
        fork_source(node.folder, as_run(node, graph), node.name)
    except NothingToFork as nothing:
        if named:
            raise
        say(f"{node.name}: --fork has no checkpoint to continue from ({nothing.reason}): it starts from step 0")
        return False
    return True


def _trains(node: Node) -> bool:
    return "save" in type(node.config).model_fields


def _launch(node: Node, recipe: Recipe, *, restart: bool, fork: bool) -> None:
    """One stage in its own process, or in several ranks. Raises Stopped or StageFailed unless it ends well.

    It gets the recipe as it was when the chain started: an edit of the file while the chain runs concerns the next run.
    """
    script = Path(__file__).parents[1] / f"{node.config.kind}.py"
    sweep_snapshots(recipe.root)
    snapshot = recipe.root / f".chain-{socket.gethostname()}-{os.getpid()}.yaml"
    write_atomic(snapshot, _resolved(recipe))
    words = [
        str(script),
        str(snapshot),
        "--stage",
        node.name,
        *(["--restart"] if restart else []),
        *(["--fork"] if fork else []),
    ]
    run_config = node.config.run
    threads = run_config.threads or max(1, _cores() // run_config.processes)
    environment = {**os.environ, "ALMA_CHAIN": str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
    (node.folder / "requeue.json").unlink(missing_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            with signals_held():  # by the ranks too, until they are there to act on them (train/stop.py, begin)
                ranks = Ranks(words, run_config.processes, environment)
                asked = stack.enter_context(_passing_on(ranks, node.name))
            codes = ranks.wait()
    finally:
        snapshot.unlink(missing_ok=True)
    _judge(node, codes, asked, ranks.killed)


@contextlib.contextmanager
def _passing_on(ranks: Ranks, stage: str):
    """Pass signals on to the ranks of a stage; a second Ctrl-C kills them. Gives the list of the signals so far."""
    from pipeline.train import stop

    asked: list[int] = []

    def handle(number, frame) -> None:
        again = number == signal.SIGINT and number in asked
        asked.append(number)
        if again:
            ranks.kill()
            return
        if number == signal.SIGINT:
            stop.tell(f"Ctrl-C: {stage} saves what is finished and stops; Ctrl-C again ends it at once")
        ranks.send(number)

    previous = stop.listen(handle)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _judge(node: Node, codes: list[int], asked: list[int], killed: bool) -> None:
    """What the exit codes of a stage's ranks mean. Raises Stopped or StageFailed, or returns if all is well."""
    from pipeline.train.stop import newest_step

    if not any(codes):
        return
    if any(code == EXIT_USER for code in codes):
        raise StageFailed(node.name, EXIT_USER)
    saved = max((newest_step(path) for path in node.folder.glob("*.partial")), default=0)
    if not hasattr(node.config, "watch"):
        place = f"there ({module_of(node.config.kind).KEPT})"
    else:
        place = f"step {saved}" if saved else "the start of this stage, for nothing was saved yet"
    if killed:
        raise StageFailed(node.name, 130, f"ended at once; the same command continues from {place}")
    if all(code in (0, EXIT_STOPPED) for code in codes):
        raise Stopped("")  # the stage has said what it saved
    try:
        word = read_record(node.folder / "requeue.json", {"reason": str})
    except (OSError, ValueError):  # the stage left none
        word = {}
    if word.get("reason") in ("hang", "lost"):
        raise Stopped(f"{node.name}: {word['message']}; the same command continues from {place}")
    signals = {rank: -code for rank, code in enumerate(codes) if code < 0}
    if asked and set(signals.values()) <= set(asked):
        raise Stopped(f"{node.name}: stopped while it was starting; the same command continues from {place}")
    if signals and (len(codes) == 1 or word.get("reason") != "failed"):
        rank, number = next(iter(signals.items()))
        who = "its process" if len(codes) == 1 else f"rank {rank}"
        memory = " (the system does this when memory runs out)" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        why = f"{who} was killed by {name}{memory}; what was done since the last save is lost"
        raise StageFailed(node.name, 1, f"{why}, and the same command continues from {place}")
    why = f"did not finish; its message is above, and the same command continues from {place}"
    raise StageFailed(node.name, 1, why)


def sweep_snapshots(folder: Path) -> None:
    """Remove recipes that killed chains of this host left. Those of other hosts and of the last hour stay: their
    process numbers say nothing here, in a container neither, and a stage that is starting reads its own."""
    for left in folder.glob(f".chain-{socket.gethostname()}-*.yaml"):
        number = left.stem.rpartition("-")[2]
        with contextlib.suppress(FileNotFoundError):  # swept by another chain at the same time
            old = time.time() - left.stat().st_mtime > 3600
            if old and Path("/proc/self").exists() and not Path(f"/proc/{number}").exists():
                left.unlink()


class StageFailed(Exception):
    """A stage's process ended badly. `text` says what is known, unless the stage has said all there is."""

    def __init__(self, stage: str, code: int, text: str = ""):
        super().__init__(f"{stage}: {text}")
        self.stage, self.code, self.text = stage, code, text


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
