"""Which layouts `alma verify parallel` compares: those of LAYOUTS, and the one that the recipe's stage is configured
with."""

from pipeline.verify.shrink import ROWS

REFERENCE = "one process"
# name, processes, `parallel` of the recipe. Pipelines last: in a process that has had one, DeepSpeed cannot build a
# plain engine any more.
LAYOUTS = (
    (REFERENCE, 1, {}),
    ("one process, 4 micro-batches", 1, {}),
    ("DDP", 2, {}),
    ("ZeRO-0", 2, {"zero": 0}),
    ("ZeRO-1", 2, {"zero": 1}),
    ("ZeRO-2", 2, {"zero": 2}),
    ("ZeRO-3", 2, {"zero": 3}),
    ("pipeline of 2", 2, {"pipeline": 2}),
    ("pipeline of 2 x 2 data ranks, ZeRO-1", 4, {"pipeline": 2, "zero": 1}),
)


def own_layout(config, num_layers: int) -> tuple[str, int, dict] | str:
    """The layout that a stage is configured with, for a model of `num_layers` layers, on as few processes as have it;
    or the name of the one in LAYOUTS that it is."""
    depth, launched = min(config.parallel.pipeline, num_layers), config.run.nodes * config.run.processes
    parallel = {**config.parallel.model_dump(exclude_defaults=True), "pipeline": depth}
    if parallel.get("layers") and (len(parallel["layers"]) != depth or sum(parallel["layers"]) != num_layers):
        del parallel["layers"]  # it counts those of the whole model

    def meant(options: dict) -> dict:  # a pipeline has ZeRO-1 in any case
        return {"pipeline": 1, **options} | ({"zero": 1} if options.get("pipeline", 1) > 1 else {})

    processes = depth if depth > 1 else 2 if parallel.get("zero") is not None or launched > 1 else 1
    if not config.compile:
        for name, count, known in LAYOUTS:
            if meant(known) == meant(parallel) and (count > 1) == (processes > 1):
                return name
    kind = f"pipeline of {depth}" if depth > 1 else f"ZeRO-{parallel['zero']}" if "zero" in parallel else "DDP"
    words = [kind if processes > 1 else REFERENCE]
    words += ["offload"] * config.parallel.offload + ["compiled"] * config.compile
    words += [f"{key} {parallel[key]}" for key in ("partition", "layers") if key in parallel]
    return f"the recipe's own: {', '.join(words)}", processes, parallel


def with_own(config, num_layers: int) -> tuple[list[tuple], str]:
    """LAYOUTS and the recipe's own, and a line that says so. `compile` belongs to the recipe's own alone."""
    own = own_layout(config, num_layers)
    if isinstance(own, str):
        return [(*layout, {}) for layout in LAYOUTS], f"layouts    {len(LAYOUTS)}, among them the recipe's own: {own}"
    changes = {"compile": True} if config.compile else {}
    plain = [layout for layout in LAYOUTS if layout[2].get("pipeline", 1) == 1]
    pipelines = LAYOUTS[len(plain) :]
    layouts = (*plain, own, *pipelines) if own[2]["pipeline"] == 1 else (*LAYOUTS, own)
    depth = config.parallel.pipeline
    fewer = f"; {depth} stages need as many layers, {num_layers} are here" if depth > num_layers else ""
    said = f"layouts    {len(LAYOUTS)}, and {own[0]} ({own[1]} process{'es' * (own[1] > 1)}){fewer}"
    return [(*layout, changes if layout is own else {}) for layout in layouts], said


def trials(precisions: list[str], layouts: list[tuple]) -> list[dict]:
    """What is trained: each layout with tied embeddings in 4 micro-batches and with untied ones in a single one; the
    reference always in a single one."""
    found = []
    for name, processes, parallel, changes in layouts:
        for precision in precisions:
            rows = ROWS // (processes // parallel.get("pipeline", 1))
            for embeddings in ("tied", "untied"):
                cut = 1 if name == REFERENCE else 4 if processes == 1 or embeddings == "tied" else 1
                found.append(
                    {
                        "layout": name,
                        "processes": processes,
                        "parallel": parallel,
                        "changes": {"activation_checkpointing": "none"} if name == REFERENCE else changes,
                        "embeddings": embeddings,
                        "micro_batches": cut,
                        "micro_batch": rows // cut,
                        "precision": precision,
                    }
                )
    return found
