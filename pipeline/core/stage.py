"""One stage in this process: what `python pipeline/KIND.py recipe.yaml` does.

A stage script ends in `main("pretrain")`; `alma run` starts the same scripts, so that a stage that is started by hand,
by a launcher or by the chain goes through the same few lines (`run_stage`).
"""

import argparse
import contextlib
import errno
import functools
import io
import os
import socket
import sys
import time
from collections.abc import Callable

from pipeline.core import external_inputs, stop, transient_errors
from pipeline.core.artifact import Artifact
from pipeline.core.chain_summary import result, shown_path
from pipeline.core.config import dump
from pipeline.core.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER, Absent, Stopped, UserError
from pipeline.core.files import write_atomic
from pipeline.core.graph import Node, ancestors, nodes
from pipeline.core.output import Output
from pipeline.core.processes import die_with_launcher
from pipeline.core.recipe import Recipe, load, make_root, module_of, resolved
from pipeline.core.status import examine_one, find_inputs, records
from pipeline.core.terminal import keep_open, say, show

# What an operating system can refuse, and what the user can do about it.
ADVICE = {
    errno.ENOSPC: "make room or give another `output`",
    errno.EDQUOT: "make room or give another `output`",
    errno.EROFS: "give an `output` that can be written",
    errno.EACCES: "give an `output` that can be written",
    errno.EPERM: "give an `output` that can be written",
    errno.ENOTDIR: "give an `output` that is a folder",
    errno.EEXIST: "give an `output` that is a folder",
}


# ---- running a stage -------------------------------------------------------------------------------------------------


def run_stage(recipe: Recipe, name: str, *, restart: bool = False, fork: bool = False) -> Artifact | None:
    """Run one stage in this process, which is one rank of it, or do nothing if its output is up to date. Returns the
    output on the main rank."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    make_root(recipe)
    graph = nodes(recipe)
    node = graph[name]
    if node.config.run.threads:
        os.environ["OMP_NUM_THREADS"] = str(node.config.run.threads)
    node.config.check(world)
    _examine_parents(node, graph)
    _fetch_inputs(node, graph)
    find_inputs(node, graph)
    if node.absent:  # there is a published output that counts as made from them, but it cannot be made again here
        examine_one(node, graph, running=False)
        if restart or node.state != "up to date":
            raise UserError(
                f"stage {name} cannot be run again: not on this machine: {', '.join(node.absent)}; {node.reason}"
            )
        say(f"{name}: up to date ({node.reason})", rank)
        return node.output
    output = Output(node.folder, name, node.config.kind, node.identity, is_main=rank == 0)
    output.open(
        config=dump(node.config),
        parents=records(node, graph),
        restart=restart,
        fork=fork,
        last_step=node.config.last_step(),
    )
    try:
        if output.published:
            say(f"{name}: up to date ({shown_path(output.published)})", rank)
            return output.published
        if rank == 0:
            write_atomic(output.path / "recipe.yaml", resolved(recipe))
        return _work(node, output, rank, world)
    except UserError as error:
        output.end_with_error(str(error))
        raise
    finally:
        output.close()


def _examine_parents(node: Node, graph: dict[str, Node]) -> None:
    """Raise UserError unless everything that a stage is made from is up to date, or at least published."""
    needed = ancestors(graph, [node.name]) - {node.name}
    for name, ancestor in graph.items():
        if name in needed:
            examine_one(ancestor, graph, running=False)
    for source in node.parents.values():
        parent = graph.get(source)
        if parent is None or parent.state == "up to date" or parent.unavailable:
            continue
        if parent.state in ("missing", "waits"):
            raise UserError(
                f"stage {node.name} needs the output of {source} ({parent.folder}/current), which does not exist; run"
                " that stage first, or the chain: alma run"
            )
        raise UserError(
            f"stage {node.name} needs the output of {source}, which is {parent.state}: {parent.reason}; run {source}"
            " first, or the chain: alma run"
        )


def _fetch_inputs(node: Node, graph: dict[str, Node]) -> None:
    """Download the models that a stage names, unless its output is up to date without them."""
    missing = []
    for key, source in node.parents.items():
        if source not in graph and external_inputs.must_be_fetched(source):
            missing.append((key, source))
    if not missing:
        return
    with contextlib.suppress(Absent):
        find_inputs(node, graph)
        return
    for key, source in missing:
        external_inputs.fetch(key, source)


def _work(node: Node, output: Output, rank: int, world: int) -> Artifact | None:
    """Do the work of a stage and publish it. A marker says why a rank failed if others run, or if starting again may
    help."""
    config = node.config
    config.check_machine()
    for warning in config.warnings():
        say(f"{node.name}: WARNING: {warning}", rank)
    with stop.interruptible(output, config.KEPT):
        try:
            with config.supervised(output):
                metrics = module_of(config.kind).run(config, node.inputs, output)
        except Exception as error:
            cause = transient_errors.cause_of(error)
            if cause or (world > 1 and not isinstance(error, UserError)):
                host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
                message = f"rank {rank} ({host}) failed: {transient_errors.first_line(error)}"
                details = {"rank": rank, "host": host, "message": message}
                stop.write_requeue_marker(output, cause or "failed", stop.saved_step(output), **details)
            raise
        if rank != 0:
            return None
        artifact = output.publish(metrics)
        say(result(artifact))
        return artifact


# ---- the program -----------------------------------------------------------------------------------------------------


def main(kind: str, argv: list[str] | None = None) -> None:
    """Entry point of a stage script: `python pipeline/KIND.py recipe.yaml [--stage NAME] [--restart|--fork]
    [key=value ...]`."""
    # Before torch is loaded. On a busy machine spinning threads cost more than sleeping ones cost on an idle one
    # (docs/log.md, 3).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv is None:
        keep_open()
    args = _arguments(kind, argv)
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's launcher has this name for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    die_with_launcher()
    code = guarded(functools.partial(_main, kind, args))
    stop.finish()
    sys.exit(code)


def _arguments(kind: str, argv: list[str] | None) -> argparse.Namespace:
    description = (module_of(kind).__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"pipeline/{kind}.py", description=description)
    parser.add_argument("recipe", help="recipe file, or the name of a recipe that comes with alma")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a key of the recipe, such as pretrain.optimizer.lr=3e-4",
    )
    parser.add_argument("--stage", help=f"which stage of kind {kind}, if the recipe has several")
    parser.add_argument(
        "--restart", action="store_true", help="set unfinished runs of this stage aside and start from the beginning"
    )
    parser.add_argument(
        "--fork", action="store_true", help="resume from the last checkpoint of a run that another recipe made"
    )
    # DeepSpeed's launcher adds it; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)  # so that key=value words may also follow an option


def _main(kind: str, args: argparse.Namespace) -> None:
    stop.begin()  # raises Stopped if the chain was interrupted while this process was importing
    recipe = load(args.recipe, args.overrides)
    names = [name for name, config in recipe.stages.items() if config.kind == kind]
    if args.stage and args.stage not in names:
        raise UserError(
            f"{args.recipe}: --stage {args.stage}: no stage of kind {kind} has this name; expected one of"
            f" {', '.join(names) or 'none'}"
        )
    if not names:
        raise UserError(f"{args.recipe}: has no stage of kind {kind}; it has {', '.join(recipe.stages)}")
    if len(names) > 1 and not args.stage:
        raise UserError(
            f"{args.recipe}: has {len(names)} stages of kind {kind} ({', '.join(names)}); choose one with --stage NAME"
        )
    run_stage(recipe, args.stage or names[0], restart=args.restart, fork=args.fork)


def guarded(action: Callable[[], None]) -> int:
    """Run `action` and return the exit code of the process: a UserError becomes a message on stderr and exit code 2, a
    stop by signal has its own code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: names of files need not be UTF-8
    rank = int(os.environ.get("RANK", 0))
    try:
        action()
        return 0
    except UserError as error:
        if rank == 0:
            show(f"error: {error}", sys.stderr)
        else:
            time.sleep(3)  # a launcher ends all ranks when the first one ends, so rank 0 must have printed by then
        return EXIT_USER
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        where = error.filename or "the output folder"
        show(f"error: {where}: {error.strerror}; {ADVICE[error.errno]}, then run the same command again", sys.stderr)
        return EXIT_USER
    except Stopped as stopped:
        if str(stopped):
            say(str(stopped), rank)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        if rank == 0:
            show("interrupted; finished stages are kept", sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        if "torch.distributed" in sys.modules:
            from pipeline.core.distributed import shutdown

            shutdown()
