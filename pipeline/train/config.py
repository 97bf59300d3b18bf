"""Keys that every training stage has. Those of one stage are in its own script."""

import contextlib
import datetime
import math
import shutil
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.core import accelerators, optional_packages
from pipeline.core.config import EXECUTION, Distinct, PlannedInput, StageConfig, Strict, refuse_unused
from pipeline.core.errors import Problems, UserError
from pipeline.core.terminal import plural
from pipeline.core.trackers import TrackerName
from pipeline.models import attention

if TYPE_CHECKING:
    from pipeline.models.sampling_cost import Sampling


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def divisors(number: int) -> list[int]:
    """All of them, ascending, in O(sqrt(number)), because a recipe may have any number."""
    small = [factor for factor in range(1, math.isqrt(number) + 1) if number % factor == 0]
    large = [number // factor for factor in small]
    return sorted({*small, *large})


def nearest_divisors(number: int, target: int) -> list[int]:
    """The two divisors of `number` that are nearest to `target`, ascending."""
    by_distance = sorted(divisors(number), key=lambda divisor: abs(divisor - target))
    return sorted(by_distance[:2])


def _iso_date(value: str) -> str:
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"{value!r} is not a date; expected YYYY-MM-DD, such as 2024-07-26") from None


def _without_boolean(value: Any) -> Any:
    """true and false, as older recipes have them."""
    if isinstance(value, bool):
        return "full" if value else "none"
    return value


Date = Annotated[str, AfterValidator(_iso_date)] | None


Decay = Annotated[float, Field(ge=0, lt=1)]


LossChunk = Annotated[Literal["auto"] | Annotated[int, Field(ge=1)] | None, EXECUTION]


def check_mixture(mixture: dict[str, float] | None):
    """Raise ValueError for weights that cannot be used. Weights below 1 are read as shares: 0.5, 0.3 and 0.15 are
    probably a typing error, 2 and 1 are not."""
    if mixture is None:
        return None
    for source, weight in mixture.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{source} has the weight {weight}, expected 0 or more")
    total = sum(mixture.values())
    if total == 0:
        raise ValueError("no source has a weight above 0; give one, or remove mixture")
    if max(mixture.values()) < 1 and abs(total - 1) > 0.005:
        raise ValueError(
            f"its weights sum to {total:.4g}, expected 1; fix them, or use relative weights such as 2 and 1"
        )
    return mixture


class Optimizer(Strict):
    """AdamW (Loshchilov & Hutter, 2019), or Muon (Jordan et al., 2024) for the matrices inside the model with AdamW
    for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon learns more from each token and needs whole matrices: not with zero or pipeline."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the two moments; (0.9, 0.95) is GPT-3's, section B."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """muon only: decay of its momentum."""
    products: Literal["auto", "fp32", "bf16"] = "auto"
    """muon only: in what its products are computed. auto: bf16, and fp32 on processors without bf16 instructions."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices; norms, biases and vectors are not decayed."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if self.kind != "muon":
            refuse_unused(self, "momentum", "applies only to kind: muon (adamw uses `betas`)")
            refuse_unused(self, "products", "applies only to kind: muon")
        return self


class Schedule(Strict):
    """Learning rate over steps: warmup, then decay to `min_ratio` of the peak."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd holds the peak and decays over the last `decay_ratio` of the steps (Hu et al., 2024)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps from 0 to the peak, linear."""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    decay_ratio: float = Field(0.2, gt=0, le=1)
    """wsd only: share of the steps that decays."""
    decay_steps: int | None = Field(None, ge=1)
    """wsd only: how many steps decay, in place of decay_ratio."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if self.kind != "wsd":
            refuse_unused(self, "decay_ratio", f"applies only to kind: wsd, and kind is {self.kind}")
            refuse_unused(self, "decay_steps", f"applies only to kind: wsd, and kind is {self.kind}")
        elif self.decay_steps:
            refuse_unused(self, "decay_ratio", "and decay_steps both set the length of the decay")
        if self.kind == "constant":
            refuse_unused(self, "min_ratio", "has no effect with kind: constant, which never decays")
        return self


class Parallel(Strict):
    """How the work is divided among processes. It does not change the result, so it is not part of a run's
    identity."""

    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage under DeepSpeed; none: plain data parallelism (DDP) without DeepSpeed."""
    shard: Literal["full", "hybrid"] | None = None
    """Split weights, gradients and moments with torch's FSDP2, in place of `zero`. full: over all processes; hybrid:
    over those of a group, and each group holds a copy."""
    shard_ranks: int | None = Field(None, ge=1)
    """shard: hybrid only: processes of a group; none: those of a node."""
    tensor: int = Field(1, ge=1)
    """shard: full only: neighbouring processes that split each matrix and compute the same rows together (tensor
    parallelism), for layers or rows that one device cannot hold. Families: docs/pretrain.md."""
    context: int = Field(1, ge=1)
    """shard: full only: neighbouring processes that share the tokens of each row (context parallelism), for rows whose
    activations one device cannot hold. Not with tensor. Families: docs/pretrain.md."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages; the number of processes divided by this is the number of data-parallel ranks."""
    partition: Literal["estimated", "uniform"] = "estimated"
    """How layers are distributed over pipeline stages: by FLOPs, the output layer included, or in equal numbers."""
    layers: list[Annotated[int, Field(ge=1)]] | None = None
    """Layers of each pipeline stage, such as [9, 8, 8, 7]; instead of `partition`. At its end a run reports how busy
    each stage was, and suggests a more even cut if there is one."""
    offload: bool = False
    """Keep the optimizer's state (ZeRO 1-3) and parameters (ZeRO 3) in CPU memory."""

    @model_validator(mode="after")
    def legal(self):
        if self.pipeline > 1 and self.zero in (2, 3):
            raise ValueError(
                f"pipeline: {self.pipeline} cannot be combined with zero: {self.zero}: ZeRO-{self.zero} splits"
                f" {'gradients and parameters' if self.zero == 3 else 'gradients'}, which a pipeline stage needs"
                " complete; use zero: 1"
            )
        if self.shard and self.zero is not None:
            raise ValueError(
                f"shard: {self.shard} and zero: {self.zero} both split the model, with torch or with DeepSpeed; keep"
                " one"
            )
        if self.shard and self.pipeline > 1:
            raise ValueError(
                f"pipeline: {self.pipeline} with shard: {self.shard} cannot be combined: DeepSpeed's pipeline has an"
                " optimizer of its own; use zero: 1, or remove pipeline"
            )
        if self.shard != "hybrid":
            refuse_unused(self, "shard_ranks", "sets the processes that share a copy, which only shard: hybrid has")
        if self.tensor > 1 and self.shard != "full":
            raise ValueError(
                f"tensor: {self.tensor} splits matrices further that shard: full has split, and here is"
                f" {f'shard: {self.shard}' if self.shard else 'no shard'}; use shard: full, or remove tensor"
            )
        if self.context > 1 and self.shard != "full":
            raise ValueError(
                f"context: {self.context} is for processes that split weights with shard: full, and here is"
                f" {f'shard: {self.shard}' if self.shard else 'no shard'}; use shard: full, or remove context"
            )
        if self.context > 1 and self.tensor > 1:
            raise ValueError(
                f"context: {self.context} and tensor: {self.tensor} both split the heads of attention, and together"
                " they were not verified; keep one"
            )
        if self.layers and len(self.layers) != self.pipeline:
            raise ValueError(
                f"layers: {self.layers} has {len(self.layers)} entries, but pipeline is {self.pipeline}; give one entry"
                " per pipeline stage"
            )
        if self.pipeline == 1:
            for key in ("partition", "layers"):
                refuse_unused(self, key, "distributes layers over pipeline stages, and pipeline is 1")
        elif self.layers:
            refuse_unused(self, "partition", "and layers both set the layers of each stage")
        if self.offload and (self.zero in (None, 0) or self.pipeline > 1):
            raise ValueError("offload needs zero: 1, 2 or 3 without a pipeline")
        return self

    def group_size(self, world: int, per_node: int) -> int | None:
        """Processes that share one copy of a model with `shard`; None without."""
        if self.shard is None:
            return None
        return world // self.tensor if self.shard == "full" else self.shard_ranks or per_node

    def data_ranks(self, world: int) -> int:
        """Shares into which `world` processes divide the rows of a step."""
        return world // (self.pipeline * self.tensor * self.context)

    @property
    def splits_weights(self) -> bool:
        """Whether a process keeps only a part of the weights, and gathers the others when it needs them."""
        return self.shard is not None or self.zero == 3

    @property
    def needs_deepspeed(self) -> bool:
        return self.zero is not None or self.pipeline > 1

    @property
    def keeps_parts(self) -> bool:
        """Whether a process keeps only a part of the model's weights."""
        return self.pipeline > 1 or self.shard is not None or self.zero == 3

    @property
    def needs_group(self) -> bool:
        """Whether even one process needs a process group."""
        return self.needs_deepspeed or self.shard is not None


class Save(Strict):
    """Training checkpoints."""

    every_steps: int = Field(500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest complete checkpoints kept."""
    keep_every: int | None = Field(None, ge=1)
    """Also keep checkpoints of steps divisible by this, where a decay can branch off (`from_step`)."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss, among steps that are both saved and evaluated
    (`evaluate_every`)."""
    asynchronous: bool = True
    """Write checkpoints in the background: training waits only for a copy in CPU memory, which is kept for the next
    one: 12 bytes per parameter over all processes."""


class Log(Strict):
    """metrics.jsonl is always written; this says how often and where else."""

    every_steps: int = Field(10, ge=1)
    """Steps between lines."""
    peak: Literal["measured"] | Annotated[float, Field(gt=0)] | None = None
    """Peak rate of one device, for MFU and the estimate of the time: TFLOP/s, or `measured` with matrix products at
    the start (takes a second); none: from a table of GPUs."""
    to: Annotated[list[TrackerName], Distinct] = []
    """Trackers that get the same numbers, each by its own package (`pip install 'alma[tensorboard]'`): offline and in
    files of the run, if no account or server is set up (docs/trackers.md)."""
    project: str | None = None
    """Project, or experiment, of the run in the trackers; by default the recipe's name."""
    wandb: str | None = None
    """Weights & Biases project: short for `to: [wandb]` and `project`."""

    @property
    def trackers(self) -> list[TrackerName]:
        return ["wandb"] if self.wandb else self.to

    @model_validator(mode="after")
    def no_unused_keys(self):
        if self.wandb:
            refuse_unused(self, "to", f"and wandb: {self.wandb} both name trackers; write to and project")
            refuse_unused(self, "project", f"and wandb: {self.wandb} both name the project; write to and project")
        elif not self.to:
            refuse_unused(self, "project", "names the run's project in trackers, and `to` names none")
        return self


class Spikes(Strict):
    """What is done about a step whose loss or gradient norm jumps (train/spikes.py). A step that is not finite is
    never applied, with any policy."""

    policy: Literal["off", "stop", "skip", "rollback"] = "off"
    """stop: the update is not made, the state before it is saved and the run ends; skip: the update is not made;
    rollback: return to the newest checkpoint and skip the rows since then."""
    sigma: float = Field(6.0, gt=0)
    """A value is a spike if it is more than this many robust deviations above the median of the last steps (6 in
    OLMo)."""
    window: int = Field(128, ge=4)
    """Applied steps that a value is compared with. While there are fewer than half of them, nothing is a spike."""
    rollbacks: int = Field(3, ge=1)
    """Rollbacks after which the next spike, or alarm of online RL, stops the run."""
    in_a_row: int = Field(16, ge=1)
    """Consecutive steps that are not applied (spikes, or not finite) after which the run stops, with every policy."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if self.policy == "off":
            refuse_unused(self, "sigma", "defines a spike, and policy: off looks for none")
            refuse_unused(self, "window", "defines a spike, and policy: off looks for none")
        return self


class Watchdog(Strict):
    """How long a rank may be silent before the run is ended and requeued (train/heartbeat.py)."""

    hang: float = Field(600, gt=0)
    """Seconds in which no rank makes progress inside a step. After that the rank that the others wait for is named,
    stacks are written and all ranks end."""
    start: float = Field(3600, gt=0)
    """The same limit for phases that may take long: starting, the first step (compiling), rollouts, evaluating, saving
    and publishing."""
    lost: float = Field(30, gt=0)
    """Seconds without a heartbeat after which a rank counts as dead. It writes one every second; with 512 ranks, every
    eight seconds."""


class TrainConfig(StageConfig):
    """A stage that updates weights. One step is one update over `batch_size` rows, whatever the number of
    processes."""

    HAS_STEPS = True
    KEPT = None

    MODEL_INPUTS: ClassVar[tuple[str, ...]] = ("model",)
    """Names of the inputs that are models and read rows of this stage. Training starts from the first."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(ge=1, le=1_000_000_000)
    """Rows (sequences, packed rows, pairs or prompts) of one step, summed over all processes."""
    sequence_length: int = Field(ge=8)
    """Tokens of one row."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast with fp32 master weights and fp32 accumulation; fp32: everything in fp32."""
    optimizer: Optimizer = Optimizer()
    """AdamW or Muon."""
    schedule: Schedule = Schedule()
    """Learning rate over steps."""
    spikes: Spikes = Spikes()
    """Jumps of the loss or the gradient norm."""
    micro_batch: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Rows in memory at a time on one process; none: its complete share. Gradients are accumulated up to
    `batch_size`."""
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full"], BeforeValidator(_without_boolean), EXECUTION
    ] = "none"
    """Keep less for the backward pass and compute the rest again. full: keep only each layer's input (Chen et al.,
    2016), a third more work; selective: also keep the results of matrix products and attention."""
    attention: Annotated[Literal["auto", "sdpa", "flash_attention_2", "eager"], EXECUTION] = "auto"
    """auto: FlashAttention-2 if it is installed and precision is bf16 on a GPU, but not for rows of several documents
    or conversations in micro-batches of more than one row; else torch's scaled_dot_product_attention."""
    compile: Annotated[bool, EXECUTION] = False
    """torch.compile each decoder layer: compiling takes tens of seconds, afterwards tokens per second are higher
    (docs/performance.md). Rows are then padded to sequence_length. Not with zero: 3."""
    parallel: Annotated[Parallel, EXECUTION] = Parallel()
    """ZeRO stage and pipeline depth."""
    save: Annotated[Save, EXECUTION] = Save()
    """Checkpoints."""
    log: Annotated[Log, EXECUTION] = Log()
    """Logging."""
    watch: Annotated[Watchdog, EXECUTION] = Watchdog()
    """Hangs and lost ranks."""
    evaluate_every: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Steps between evaluations on held-out data. There is always one before the first and one after the last
    step."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if not self.uses_peak():
            try:
                refuse_unused(self.log, "peak", "is for estimates of time, which here depend on the answers' lengths")
            except ValueError as error:
                raise ValueError(f"log.{error}") from None
        return self

    @model_validator(mode="after")
    def rollbacks_of_something(self):
        if not self.rolls_back():
            why = f"applies only to policy: rollback, and policy is {self.spikes.policy}"
            try:
                refuse_unused(self.spikes, "rollbacks", why)
            except ValueError as error:
                raise ValueError(f"spikes.{error}") from None
        return self

    @property
    def wide_precision(self) -> Literal["fp32", "bf16"]:
        """The type of what is not multiplied in fp8, which only pretraining has."""
        return self.precision

    @model_validator(mode="after")
    def whole_matrices(self):
        if self.optimizer.kind == "muon" and self.parallel.needs_deepspeed:
            raise ValueError(
                "optimizer.kind: muon needs complete matrices, which DeepSpeed (zero, pipeline) keeps in parts of a"
                " flat buffer; use shard: full, plain data parallelism (parallel: {}), or adamw"
            )
        if self.optimizer.kind == "muon" and self.parallel.context > 1:
            raise ValueError(
                f"optimizer.kind: muon was not verified with context: {self.parallel.context}; use shard: full without"
                " context, or adamw"
            )
        if self.optimizer.kind == "muon" and self.parallel.tensor > 1:
            raise ValueError(
                f"optimizer.kind: muon needs complete matrices, of which tensor: {self.parallel.tensor} leaves each"
                " process a part; use shard: full without tensor, or adamw"
            )
        return self

    def check(self, world: int) -> None:
        self._check_keep_best()
        self._check_compiler()
        self.check_layout(world)

    def obstacle_on(self, kind: str) -> str | None:
        if kind not in accelerators.UNTESTED:
            return None
        parallel = self.parallel
        for key, value, plain in (
            ("zero", parallel.zero, None), ("shard", parallel.shard, None), ("pipeline", parallel.pipeline, 1)
        ):  # fmt: skip
            if value != plain:
                return f"parallel.{key}: {value}"
        if self.compile:
            return "compile: true"
        return "precision: bf16" if self.precision == "bf16" and not accelerators.has_bf16(kind) else None

    def check_machine(self) -> None:
        problems = Problems()
        with problems.gather():
            super().check_machine()
        if self.parallel.needs_deepspeed:
            key = f"pipeline: {self.parallel.pipeline}" if self.parallel.pipeline > 1 else f"zero: {self.parallel.zero}"
            instead = "" if self.parallel.pipeline > 1 else "split the model with torch: shard: full"
            with problems.gather():
                optional_packages.require("deepspeed", f"stage {self.kind}: parallel.{key}", instead)
        for tracker in self.log.trackers:
            key = "log.wandb" if self.log.wandb else f"log.to: {tracker}"
            with problems.gather():
                optional_packages.require(tracker, f"stage {self.kind}: {key}", "remove it")
        problems.refuse()

    def warnings(self) -> list[str]:
        steps, warmup = self.last_step(), self.warmup_steps()
        if steps is None or warmup is None or warmup <= steps:
            return super().warnings()
        return [
            *super().warnings(),
            f"schedule: a warmup of {plural(warmup, 'step', ',')} is longer than the run of {steps:,}, so that the"
            " learning rate never reaches its peak",
        ]

    def rolls_back(self) -> bool:
        """Whether a run may have to return to a checkpoint, so that there must always be one."""
        return self.spikes.policy == "rollback"

    def warmup_steps(self) -> int | None:
        """Steps of the warmup; None if only the running stage can tell."""
        return self.schedule.warmup_steps

    def check_layout(self, world: int) -> None:
        """Check that `world` processes can have this layout. Raises UserError."""
        self._check_pipeline(world)
        self._check_shard(world)
        attention.check_packed(
            self.attention, self.packed_rows(world), f"stage {self.kind}: attention: {self.attention}"
        )
        self._check_batch(self.parallel.data_ranks(world))

    def _check_pipeline(self, world: int) -> None:
        depth = self.parallel.pipeline
        if self.parallel.zero == 3 and self.activation_checkpointing == "selective":
            raise UserError(
                f"stage {self.kind}: activation_checkpointing: selective cannot be combined with zero: 3, which gathers"
                " weights again while results are recomputed, so that torch does not find those it kept; use full, or"
                " zero: 2"
            )
        if self.compile and self.parallel.zero == 3:
            raise UserError(
                f"stage {self.kind}: compile: true cannot be combined with zero: 3, which gathers weights module by"
                " module while a layer runs; use zero: 2, or remove compile"
            )
        if depth > 1 and not type(self).supports_pipeline():
            raise UserError(f"stage {self.kind}: pipeline: {depth} is for pretraining; use zero: 0, 1, 2 or 3 here")
        if world % depth:
            below = max(1, world // depth) * depth
            above = (world // depth + 1) * depth
            raise UserError(
                f"stage {self.kind}: {plural(world, 'process/processes')} cannot be divided into pipeline: {depth}"
                f" stages; launch {_either(sorted({below, above}))}, or give"
                f" parallel.pipeline={_either(nearest_divisors(world, depth))}"
            )

    def _check_shard(self, world: int) -> None:
        parallel = self.parallel
        for key, size in (("tensor", parallel.tensor), ("context", parallel.context)):
            if size > 1 and not type(self).supports_row_groups():
                raise UserError(f"stage {self.kind}: {key}: {size} is for pretraining; use shard: full without it here")
            if size > 1 and self.compile:
                raise UserError(
                    f"stage {self.kind}: compile: true with {key}: {size} was not verified: layers then wait for other"
                    " processes inside; remove one of them"
                )
            if world % size:
                raise UserError(
                    f"stage {self.kind}: {plural(world, 'process/processes')} cannot be divided into groups of {key}:"
                    f" {size}; use {_either(nearest_divisors(world, size))}"
                )
        if self.sequence_length % parallel.context:
            near = nearest_divisors(self.sequence_length, parallel.context)
            raise UserError(
                f"stage {self.kind}: sequence_length {self.sequence_length} cannot be divided into context:"
                f" {parallel.context} equal parts; use {_either(near)}"
            )
        if parallel.shard_ranks and world % parallel.shard_ranks:
            raise UserError(
                f"stage {self.kind}: {plural(world, 'process/processes')} cannot be divided into groups of"
                f" parallel.shard_ranks: {parallel.shard_ranks}; use"
                f" {_either(nearest_divisors(world, parallel.shard_ranks))}"
            )

    def _check_compiler(self) -> None:
        if self.compile and not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError(
                f"stage {self.kind}: compile: true needs a C++ compiler (g++ or clang++), and this machine has none on"
                " its PATH; install one or remove compile"
            )

    def _check_keep_best(self) -> None:
        if not self.save.keep_best:
            return
        every, steps = self.evaluate_every, self.steps or math.inf
        if every is None or math.lcm(every, self.save.every_steps) > steps:
            raise UserError(
                f"stage {self.kind}: save.keep_best: no step is both saved (save.every_steps: {self.save.every_steps})"
                f" and evaluated (evaluate_every: {every or 'none'}); make one a multiple of the other"
            )

    def _check_batch(self, ranks: int) -> None:
        """ranks: data-parallel ones."""
        if self.batch_size % ranks:
            below = self.batch_size // ranks * ranks
            sizes = [below, below + ranks] if below else [ranks]
            fewer_ranks = [number for number in divisors(self.batch_size) if number < ranks][-2:]
            per_rank = self.parallel.pipeline * self.parallel.tensor * self.parallel.context
            processes = [number * per_rank for number in fewer_ranks]
            raise UserError(
                f"stage {self.kind}: batch_size {self.batch_size} is not divisible by {ranks} data-parallel ranks; use"
                f" {_either(sizes)}, or {_either(processes)} {'process' if processes[-1] == 1 else 'processes'}"
            )
        rows = self.rows_of_step() // ranks
        if self.micro_batch and rows % self.micro_batch:
            raise UserError(
                f"stage {self.kind}: a rank's share of {rows} rows is not divisible by micro_batch {self.micro_batch};"
                f" use {_either(nearest_divisors(rows, self.micro_batch))}"
            )

    def micro_rows(self, world: int) -> int:
        """Rows of a micro-batch in `world` processes."""
        return self.micro_batch or self.rows_of_step() // self.parallel.data_ranks(world)

    def rows_of_step(self) -> int:
        """Rows that all processes together compute a step from."""
        return self.batch_size

    def rows_of_update(self) -> int:
        """Rows of one update, of which a step may have several."""
        return self.rows_of_step()

    @classmethod
    def supports_pipeline(cls) -> bool:
        return False

    @classmethod
    def supports_row_groups(cls) -> bool:
        """Whether several processes may compute the same rows: `tensor` and `context`."""
        return False

    def sequences_per_row(self) -> int:
        """Sequences of sequence_length tokens that the model reads for one row: a pair has two."""
        return 1

    def other_models(self) -> dict[str, bool]:
        """Further models of the same size in memory, by name, and whether each is trained."""
        return {}

    def sampling(self, world: int) -> "Sampling | None":
        """What each of `world` processes samples at a time; None if the stage does not."""
        return None

    def with_fewer_samples(self) -> list[Self]:
        """This config, and the same with fewer and fewer rows sampled at a time, which changes memory and no result."""
        return [self]

    def loss_tokens(self) -> int | None:
        """Most tokens of a row that the loss gets logits of; None: all."""
        return None

    def packed_rows(self, world: int) -> int:
        """Rows of a micro-batch in which documents or conversations are kept apart by positions; 1 if none are."""
        return 1

    def head_chunk(self) -> Literal["auto"] | int | None:
        """Tokens whose losses the output layer computes at a time; None if the loss gets logits."""
        return None

    @classmethod
    def balances_experts(cls) -> bool:
        """Whether a mixture of experts is trained with its balancing loss (train/moe_aux_loss.py)."""
        return True

    @classmethod
    def uses_peak(cls) -> bool:
        """Whether the time of a run follows from the rate of its devices."""
        return True

    @classmethod
    def uses_device(cls) -> bool:
        return True

    def last_step(self) -> int | None:
        return self.steps

    def supervised(self, output) -> contextlib.AbstractContextManager:
        from pipeline.train.heartbeat import Watch

        return Watch(output, self.watch)

    def input_models(self, inputs: dict[str, PlannedInput]) -> list[PlannedInput]:
        """The models that read rows of this stage, as far as they are given."""
        return [inputs[name] for name in self.MODEL_INPUTS if name in inputs]

    def initial_model(self, inputs: dict[str, PlannedInput]) -> PlannedInput | None:
        """The model that training starts from; None for a new one."""
        return inputs.get(self.MODEL_INPUTS[0])

    def planned_positions(self, inputs: dict[str, PlannedInput]) -> int | None:
        """Those of the model that training starts from."""
        from pipeline.train import planned_model

        parent = self.initial_model(inputs)
        return planned_model.num_positions(parent) if parent else None

    def planned_model_config(self, inputs: dict[str, PlannedInput]) -> Any:
        """transformers' configuration of the model that is trained; None if it is not known before the stage runs."""
        from pipeline.train import planned_model

        parent = self.initial_model(inputs)
        return planned_model.config_of(parent) if parent else None

    def planned_tokens(self) -> int | None:
        """Tokens that the whole stage reads; None if only the running stage can tell."""
        return None

    def planned_vocabulary(self, inputs: dict[str, PlannedInput]) -> int | None:
        from pipeline.train import planned_model

        parent = self.initial_model(inputs) or inputs.get("tokenizer")
        return planned_model.vocabulary_of(parent) if parent else None

    def planned_tokenizer(self, inputs: dict[str, PlannedInput]) -> Any:
        """That of the model that training starts from, or the one that packed the text."""
        from pipeline.train import planned_model

        parent = self.initial_model(inputs) or inputs.get("tokenizer")
        return planned_model.tokenizer_of(parent) if parent else None
