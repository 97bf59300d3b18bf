"""Which layouts `alma verify` proves: those of LAYOUTS or some of them, and the one that the recipe's stage is
configured with."""

from pipeline.checks.small_recipe import ROWS

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


# Those that `alma verify resume` moves a run through, before it ends in the recipe's own.
ROAD = (REFERENCE, "DDP", "ZeRO-3", "pipeline of 2")


def own_layout(config, num_layers: int) -> tuple[str, int, dict, dict]:
    """The layout that a stage is configured with, for a model of `num_layers` layers, on as few processes as have it;
    it may be one of LAYOUTS. Last, other keys of the stage that belong to it: `compile`."""
    depth, launched = min(config.parallel.pipeline, num_layers), config.run.world
    parallel = config.parallel.model_dump(exclude_defaults=True, exclude={"pipeline"})
    parallel |= {"pipeline": depth} if depth > 1 else {}
    if parallel.get("layers") and (len(parallel["layers"]) != depth or sum(parallel["layers"]) != num_layers):
        del parallel["layers"]  # it counts those of the whole model

    def meant(options: dict) -> dict:  # a pipeline has ZeRO-1 in any case
        return {"pipeline": 1, **options} | ({"zero": 1} if options.get("pipeline", 1) > 1 else {})

    processes = depth if depth > 1 else 2 if parallel.get("zero") is not None or launched > 1 else 1
    if not config.compile:
        for name, count, known in LAYOUTS:
            if meant(known) == meant(parallel) and (count > 1) == (processes > 1):
                return name, count, known, {}
    kind = f"pipeline of {depth}" if depth > 1 else f"ZeRO-{parallel['zero']}" if "zero" in parallel else "DDP"
    words = [kind if processes > 1 else REFERENCE]
    words += ["offload"] * config.parallel.offload + ["compiled"] * config.compile
    words += [f"{key} {parallel[key]}" for key in ("partition", "layers") if key in parallel]
    return f"the recipe's own: {', '.join(words)}", processes, parallel, {"compile": True} if config.compile else {}


def with_own(config, num_layers: int) -> tuple[list[tuple], str]:
    """LAYOUTS and the recipe's own, and a line that says so."""
    known, own = [(*layout, {}) for layout in LAYOUTS], own_layout(config, num_layers)
    if own in known:
        return known, f"layouts    {len(known)}, among them the recipe's own: {own[0]}"
    plain = [layout for layout in known if layout[2].get("pipeline", 1) == 1]
    layouts = [*plain, own, *known[len(plain) :]] if "pipeline" not in own[2] else [*known, own]
    depth = config.parallel.pipeline
    fewer = f"; {depth} stages need as many layers, {num_layers} are here" if depth > num_layers else ""
    return layouts, f"layouts    {len(known)}, and {own[0]} ({own[1]} process{'es' * (own[1] > 1)}){fewer}"


def road(config, shape) -> tuple[list[tuple], str]:
    """The layouts that a run is moved through, and a line that says so: ROAD, without a pipeline where the model's
    `shape` cannot be cut, and then the recipe's own, or one process if that was on the way."""
    from pipeline.models.families import family_of

    known = {name: (name, *layout, {}) for name, *layout in LAYOUTS}
    own = own_layout(config, shape.num_hidden_layers)
    cut = family_of(shape).pipeline and shape.num_hidden_layers > 1
    way = [known[name] for name in ROAD if cut or known[name][2].get("pipeline", 1) == 1]
    way.append(own if own[0] not in ROAD else known[REFERENCE])
    why = "" if cut else "; no pipeline, since this model cannot be cut into stages"
    return way, f"moved      {' -> '.join(name for name, *_ in way)}{why}"


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
