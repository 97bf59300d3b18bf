"""The layouts that `alma verify` compares: LAYOUTS, and the one that the recipe's stage is configured with."""

from typing import NamedTuple

from pipeline.checks.small_recipe import ROWS
from pipeline.core import optional_packages
from pipeline.core.terminal import plural
from pipeline.train.config import Parallel


class Layout(NamedTuple):
    name: str
    processes: int
    parallel: dict
    """The block `parallel` of the recipe."""
    changes: dict = {}
    """Other keys of the stage that belong to the layout: `compile`."""

    def lacking(self) -> str:
        """Why this layout cannot be trained on this machine, if a package is missing."""
        if not Parallel(**self.parallel).needs_deepspeed or optional_packages.is_installed("deepspeed"):
            return ""
        return f"needs the package deepspeed: {optional_packages.install_line('deepspeed')}"

    @property
    def depth(self) -> int:
        """Stages of the pipeline."""
        return self.parallel.get("pipeline", 1)

    @property
    def data_ranks(self) -> int:
        return Parallel(**self.parallel).data_ranks(self.processes)


REFERENCE = "one process"
# Pipelines last: in a process that has had one, DeepSpeed cannot build a plain engine any more.
LAYOUTS = (
    Layout(REFERENCE, 1, {}),
    Layout("one process, 4 micro-batches", 1, {}),
    Layout("DDP", 2, {}),
    Layout("ZeRO-0", 2, {"zero": 0}),
    Layout("ZeRO-1", 2, {"zero": 1}),
    Layout("ZeRO-2", 2, {"zero": 2}),
    Layout("ZeRO-3", 2, {"zero": 3}),
    Layout("FSDP", 2, {"shard": "full"}),
    Layout("FSDP, 2 copies x 2 ranks", 4, {"shard": "hybrid", "shard_ranks": 2}),
    Layout("FSDP, tensor 2", 2, {"shard": "full", "tensor": 2}),
    Layout("FSDP over 2 x tensor 2", 4, {"shard": "full", "tensor": 2}),
    Layout("FSDP, context 2", 2, {"shard": "full", "context": 2}),
    Layout("FSDP over 4, context 2", 4, {"shard": "full", "context": 2}),
    Layout("pipeline of 2", 2, {"pipeline": 2}),
    Layout("pipeline of 2 x 2 data ranks, ZeRO-1", 4, {"pipeline": 2, "zero": 1}),
)
MUON_REFERENCE = "one process, Muon"
# Further ones, of a recipe with Muon. DeepSpeed has none of them.
MUON_LAYOUTS = (
    Layout(MUON_REFERENCE, 1, {}),
    Layout("DDP, Muon", 2, {}),
    Layout("FSDP, Muon", 2, {"shard": "full"}),
    Layout("FSDP, 2 copies x 2 ranks, Muon", 4, {"shard": "hybrid", "shard_ranks": 2}),
)
REFERENCES = (REFERENCE, MUON_REFERENCE)
# Those through which `alma verify resume` moves a run, before it ends in the recipe's own.
ROUTE = (REFERENCE, "DDP", "ZeRO-3", "FSDP", "FSDP, tensor 2", "pipeline of 2")


def own_layout(config, num_layers: int) -> Layout:
    """The layout that a stage is configured with, for a model of `num_layers` layers, on as few processes as can have
    it; one of LAYOUTS if it is the same."""
    depth = min(config.parallel.pipeline, num_layers)
    parallel = config.parallel.model_dump(exclude_defaults=True, exclude={"pipeline"})
    if depth > 1:
        parallel["pipeline"] = depth
    layers = parallel.get("layers")
    if layers and (len(layers) != depth or sum(layers) != num_layers):
        del parallel["layers"]  # it is for the layers of the model as the recipe has it

    processes = 1
    if depth > 1:
        processes = depth
    elif config.parallel.tensor > 1 or config.parallel.context > 1:
        parallel["tensor" if config.parallel.tensor > 1 else "context"] = 2
        processes = 2 if config.parallel.data_ranks(config.run.world) == 1 else 4
    elif config.parallel.shard == "hybrid":
        processes = 4
        parallel["shard_ranks"] = 2  # groups as small as they can be
    elif config.parallel.needs_group or config.run.world > 1:
        processes = 2
    if not config.compile:
        for layout in LAYOUTS:
            if _same(layout.parallel, parallel) and layout.processes == processes:
                return layout
    name = ", ".join([_kind(processes, parallel), *_options(config, parallel)])
    return Layout(f"the recipe's own: {name}", processes, parallel, {"compile": True} if config.compile else {})


def _same(one: dict, other: dict) -> bool:
    return _with_defaults(one) == _with_defaults(other)


def _with_defaults(parallel: dict) -> dict:
    options = {"pipeline": 1} | parallel
    if options["pipeline"] > 1:
        options["zero"] = 1  # a pipeline always has ZeRO-1
    return options


def _kind(processes: int, parallel: dict) -> str:
    if processes == 1:
        return REFERENCE
    if "pipeline" in parallel:
        return f"pipeline of {parallel['pipeline']}"
    if "tensor" in parallel:
        return "FSDP, tensor 2" if processes == 2 else "FSDP over 2 x tensor 2"
    if "context" in parallel:
        return "FSDP, context 2" if processes == 2 else "FSDP over 4, context 2"
    if "shard" in parallel:
        return "FSDP" if parallel["shard"] == "full" else "FSDP, 2 copies x 2 ranks"
    return f"ZeRO-{parallel['zero']}" if "zero" in parallel else "DDP"


def _options(config, parallel: dict) -> list[str]:
    words = []
    if config.parallel.offload:
        words.append("offload")
    if config.compile:
        words.append("compiled")
    return words + [f"{key} {parallel[key]}" for key in ("partition", "layers") if key in parallel]


def with_own(config, num_layers: int) -> tuple[list[Layout], str]:
    """LAYOUTS and the recipe's own, and a line that says so."""
    own = own_layout(config, num_layers)
    layouts = list(LAYOUTS)
    if own in layouts:
        return layouts, f"layouts    {len(layouts)}, among them the recipe's own: {own.name}"
    line = f"layouts    {len(layouts)}, and {own.name} ({plural(own.processes, 'process/processes')})"
    if config.parallel.pipeline > num_layers:
        line += f"; {config.parallel.pipeline} stages need as many layers, here are {num_layers}"
    if own.depth > 1:
        return [*layouts, own], line
    without_pipeline = [layout for layout in layouts if layout.depth == 1]
    return [*without_pipeline, own, *layouts[len(without_pipeline) :]], line


def with_muon(layouts: list[Layout], optimizer: dict) -> list[Layout]:
    """Those of a recipe with Muon, before the pipelines. optimizer: the block of the recipe."""
    own = [layout._replace(changes={"optimizer": optimizer}) for layout in MUON_LAYOUTS]
    without_pipeline = [layout for layout in layouts if layout.depth == 1]
    return [*without_pipeline, *own, *layouts[len(without_pipeline) :]]


def route(config, shape) -> tuple[list[Layout], str]:
    """The layouts through which a run is moved, and a line that says so: ROUTE, without a pipeline if the model's
    `shape` cannot be cut into stages, and without a tensor group if its matrices cannot be split; and then the recipe's
    own, or one process if the recipe's own is on the route."""
    from pipeline.models.families import family_of
    from pipeline.train import tensor_parallel

    can_be_cut = family_of(shape).pipeline and shape.num_hidden_layers > 1
    can_be_split = tensor_parallel.obstacle(shape, 2) is None
    by_name = {layout.name: layout for layout in LAYOUTS}
    named = [by_name[name] for name in ROUTE if can_be_cut or by_name[name].depth == 1]
    named = [layout for layout in named if can_be_split or "tensor" not in layout.parallel]
    own = own_layout(config, shape.num_hidden_layers)
    named.append(by_name[REFERENCE] if own.name in ROUTE else own)
    result = [layout for layout in named if not layout.lacking()]
    lacking = [layout.name for layout in named if layout.lacking()]
    line = f"moved      {' -> '.join(layout.name for layout in result)}"
    if not can_be_cut:
        line += "; no pipeline, because this model cannot be cut into stages"
    if not can_be_split:
        line += "; no tensor group, because this model's layers cannot be split over two processes"
    if lacking:
        line += f"; without {' and '.join(lacking)}, for the package deepspeed is not installed:"
        line += f" {optional_packages.install_line('deepspeed')}"
    return result, line


def trials(precisions: list[str], layouts: list[Layout]) -> list[dict]:
    """What is trained: each layout with tied embeddings in 4 micro-batches (of four data ranks: in 2), and with untied
    ones in one; the reference always in one. With one process both are in 4 micro-batches."""
    result = []
    for layout in layouts:
        rows = ROWS // layout.data_ranks
        for precision in precisions:
            for embeddings in ("tied", "untied"):
                micro_batches = 1
                if layout.name not in REFERENCES and (layout.processes == 1 or embeddings == "tied"):
                    micro_batches = min(4, rows)
                changes = layout.changes
                if layout.name in REFERENCES:
                    changes = changes | {"activation_checkpointing": "none"}
                trial = {
                    "layout": layout.name,
                    "processes": layout.processes,
                    "parallel": layout.parallel,
                    "changes": changes,
                    "embeddings": embeddings,
                    "micro_batches": micro_batches,
                    "micro_batch": rows // micro_batches,
                    "precision": precision,
                }
                if layout.lacking():
                    trial["refused"] = layout.lacking()
                result.append(trial)
    return result
