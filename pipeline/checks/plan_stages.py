"""What `alma plan` knows of each training stage of a recipe before it runs: its model, its layouts on a cluster, its
data. No data are read and nothing is allocated."""

from dataclasses import dataclass, field

from pipeline.checks.plan_apply import REMOVE
from pipeline.core import artifact
from pipeline.core.errors import UserError
from pipeline.core.graph import Node, planned_inputs
from pipeline.models import cost
from pipeline.models.devices import Cluster
from pipeline.train import layouts
from pipeline.train.config import Parallel, TrainConfig
from pipeline.train.finetune_config import FinetuneConfig
from pipeline.train.layouts import Candidate


@dataclass(frozen=True)
class StagePlan:
    """One training stage on a cluster."""

    name: str
    config: TrainConfig
    cluster: Cluster
    size: cost.Size
    flops: cost.Flops
    current: Candidate | None
    """As the recipe has it; None if this cluster cannot have it."""
    current_problem: str
    """Why not."""
    found: list[Candidate]
    """All layouts, those that fit first, the fastest first."""
    refused: dict[str, list[str]]
    """Why others cannot be had -> which."""
    reads_packed: bool
    """It reads the tokens of a stage of kind pack."""
    tokens_present: int | None
    """Packed tokens that stage pack has published; None if there are none yet."""

    @property
    def fitting(self) -> list[Candidate]:
        return [one for one in self.found if one.fits(self.cluster)]

    @property
    def best(self) -> Candidate:
        """The fastest that fits, or the smallest if the time cannot be predicted."""
        return self.fitting[0] if self.timed else min(self.fitting, key=lambda one: one.peak)

    def recipe_keys(self, candidate: Candidate, explicit: bool) -> dict[tuple[str, ...], object]:
        """Where in the recipe -> value, for the keys that give the stage this layout on this cluster.

        Keys that become their default are removed, or with `explicit` written out: a recipe that extends another one
        would inherit the other's."""
        stage = ("stages", self.name)
        fields = type(self.config).model_fields
        result: dict[tuple[str, ...], object] = {}
        for key in ("parallel", "micro_batch", "activation_checkpointing", "compile"):
            value = candidate.keys.get(key)
            if key == "parallel" and explicit:
                result[*stage, key] = _written_out(self.config.parallel, value)
            elif value:
                result[*stage, key] = value
            elif key in fields:
                result[*stage, key] = fields[key].default if explicit else REMOVE
        sampling = self.config.sampling(self.cluster.count)
        if sampling is not None and candidate.keys[sampling.key] != sampling.rows:
            result[*stage, *sampling.key.split(".")] = candidate.keys[sampling.key]
        if self.cluster.nodes > 1 or self.config.run.nodes:
            result[*stage, "run", "nodes"] = self.cluster.nodes
        result[*stage, "run", "processes"] = self.cluster.local
        return result

    @property
    def checkpoint_bytes(self) -> float:
        return cost.checkpoint_bytes(self.size, self.config.optimizer.kind)

    @property
    def num_checkpoints(self) -> int:
        """Most checkpoints on disk at a time; one of them is being written."""
        save, steps = self.config.save, self.config.last_step()
        number = save.keep + 1 + save.keep_best
        if save.keep_every and steps:
            number += steps // save.keep_every
        return number

    @property
    def timed(self) -> bool:
        """Whether a step's time can be predicted: not while the stage samples."""
        return self.config.uses_peak()

    def hours(self, candidate: Candidate) -> float | None:
        """Of all steps, without evaluations; None if the number of steps is not known before the stage runs."""
        steps = self._steps()
        return None if steps is None or not self.timed else steps * candidate.step_seconds / 3600

    @property
    def step_tokens(self) -> int:
        return self.config.batch_size * self.config.sequences_per_row() * self.config.sequence_length

    def _steps(self) -> int | None:
        steps = self.config.last_step()
        if steps is None and "tokens_per_parameter" in type(self.config).model_fields:
            ratio = dict(self.config)["tokens_per_parameter"]
            if ratio:
                steps = -(-int(ratio * self.size.total) // self.step_tokens)
        return steps

    def tokens_needed(self) -> int | None:
        steps = self._steps()
        return None if steps is None else steps * self.step_tokens


def _written_out(before: Parallel, keys: dict) -> dict:
    """The keys of `parallel`, with the defaults of those that it has now."""
    defaults = {key: Parallel.model_fields[key].default for key in before.model_dump(exclude_defaults=True)}
    return defaults | keys


@dataclass
class Unplanned:
    """A training stage whose model is not known before other stages have run."""

    name: str
    reason: str


@dataclass
class RecipePlan:
    stages: list[StagePlan] = field(default_factory=list)
    unplanned: list[Unplanned] = field(default_factory=list)


def plan_recipe(graph: dict[str, Node], names: list[str], cluster: Cluster) -> RecipePlan:
    """The training stages of a recipe, or those that are named. Raises UserError if none of them trains."""
    result = RecipePlan()
    for name, node in graph.items():
        if names and name not in names:
            continue
        if not isinstance(node.config, TrainConfig):
            if names:
                raise UserError(f"{name}: stages of kind {node.config.kind} do not train, so they have no layout")
            continue
        planned = plan_stage(node, graph, cluster)
        (result.stages if isinstance(planned, StagePlan) else result.unplanned).append(planned)
    if not result.stages and not result.unplanned:
        raise UserError(
            "this recipe has no stage that trains; alma plan is for pretrain, sft, reward, dpo, ppo and grpo"
        )
    return result


def plan_stage(node: Node, graph: dict[str, Node], cluster: Cluster) -> StagePlan | Unplanned:
    config = node.config
    model_config = config.planned_model_config(planned_inputs(node, graph))
    if model_config is None:
        return Unplanned(
            node.name, "its model or its vocabulary is not known before the stages in front of it have run"
        )
    model = on_meta(model_config)
    costs = costs_of(model, config)
    current, problem = None, ""
    try:
        current = layouts.candidate(config, costs, cluster)
    except UserError as error:
        problem = str(error)
    found, refused = layouts.search(config, costs, cluster)
    return StagePlan(
        name=node.name,
        config=config,
        cluster=cluster,
        size=costs.size,
        flops=cost.training_flops(model, costs.size, config.sequence_length),
        current=current,
        current_problem=problem,
        found=found,
        refused=refused,
        reads_packed="tokens" in node.parents,
        tokens_present=_tokens_present(node, graph),
    )


def costs_of(model, config: TrainConfig) -> layouts.Costs:
    """With the adapters of a stage that has them. A model on the meta device needs no package for 4 bits."""
    if not isinstance(config, FinetuneConfig) or config.lora is None:
        return layouts.costs_of(model, config)
    import torch

    from pipeline.models import frozen, lora

    frozen.store(model, config.lora.base, config.precision, torch.device("meta"), ())
    lora.attach(model, config.lora, 0, ())
    return layouts.costs_of(model, config)


def on_meta(model_config):
    """The causal LM of a configuration, without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)


def _tokens_present(node: Node, graph: dict[str, Node]) -> int | None:
    parent = graph.get(node.parents.get("tokens", ""))
    packed = artifact.current(parent.folder) if parent else None
    return packed.metrics.get("tokens") if packed else None
