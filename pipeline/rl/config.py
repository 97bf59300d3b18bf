"""Keys of ppo and grpo in a recipe: algorithm, sampling, optimizers. The other keys are in online_config.py and in the
two stages."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.config import EXECUTION, Strict, refuse_unused
from pipeline.train.config import Decay
from pipeline.train.finetune_config import FinetuneOptimizer, FinetuneSchedule

# Tokens of a micro-batch, if the recipe does not say. More are no faster, and rows of all lengths would be padded.
MICRO_BATCH_TOKENS = 8192


class PolicyOptimizer(FinetuneOptimizer):
    """AdamW as PPO on language models uses it."""

    USUAL_LR = (1e-7, 3e-4)

    lr: float = Field(3e-6, gt=0)
    """Peak learning rate; 3e-6 suits models of 1B to 7B (Huang et al., 2024), small ones take 1e-5 to 1e-4."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = Field(1e-5, gt=0)
    """Added to the denominator; 1e-5 as in the original, where it matters in the first steps (Huang et al., 2024,
    detail 7)."""


class ValueOptimizer(PolicyOptimizer):
    """AdamW of the value model."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate; the value model may learn faster than the policy."""


class LinearSchedule(FinetuneSchedule):
    """Learning rates over iterations, of the same shape for policy and value model."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "linear"
    """Annealed linearly, as in the original."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""


class Server(Strict):
    """A vLLM server that samples, in an environment of its own. The stage starts it on the machine of its first process
    and ends it."""

    command: str = "vllm"
    """vLLM's program, such as /opt/vllm/bin/vllm."""
    arguments: list[str] = []
    """Further words of `vllm serve`, such as [--tensor-parallel-size, "2", --gpu-memory-utilization, "0.4"]."""
    gpus: str | None = None
    """GPUs that it sees, such as "6,7" (CUDA_VISIBLE_DEVICES); none: those that the stage sees."""
    start: float = Field(600.0, gt=0)
    """Seconds from its start until it is healthy."""
    answer: float = Field(300.0, gt=0)
    """Seconds in which at least one response must arrive, and in which new weights must be read."""
    restarts: int = Field(3, ge=0)
    """How often a server that is lost, too slow or has other weights is started again before the run ends."""
    tolerance: float = Field(0.1, gt=0)
    """Most nats per token by which its log-probabilities may differ, on average, from those of the trainer after new
    weights. Equal arithmetic in fp32 gives 1e-5, bf16 about 0.01."""


class Rollout(Strict):
    """Sampling of responses, from the whole distribution: top-k or top-p would give other probabilities than those that
    are trained."""

    max_new_tokens: int = Field(64, ge=1)
    """Maximum tokens of a response; one that has not ended by then is cut off and pays `missing_eos_penalty`."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this in sampling and in every log-probability."""
    batch: Annotated[int, EXECUTION] = Field(64, ge=1)
    """Rows that one process samples or measures at a time."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: the policy itself, or a vLLM server that gets its weights before each iteration."""
    server: Annotated[Server | None, EXECUTION] = None
    """The server of engine: vllm."""
    ahead: bool = False
    """Sample the next iteration's responses while the policy learns from this one's, with the weights from before its
    updates (one step off). The first iteration's are sampled with its own."""
    max_staleness: int | None = Field(None, ge=0)
    """With `ahead`: a response that was sampled more updates of the policy ago than this carries no policy loss; none:
    all count."""

    @model_validator(mode="after")
    def fitting_keys(self):
        if not self.ahead:
            refuse_unused(self, "max_staleness", "is for ahead: true; without it all responses are of current weights")
        if self.engine != "vllm" and self.server is not None:
            raise ValueError(f"server is for engine: vllm, not {self.engine}; remove it")
        return self

    def server_options(self) -> Server:
        return self.server or Server()


class Updates(Strict):
    """What the policy learns from an iteration's responses, by any algorithm."""

    epochs: int = Field(4, ge=1)
    """Passes over an iteration's samples, each in another order."""
    minibatches: int = Field(1, ge=1)
    """Updates per pass."""
    clip: float = Field(0.2, gt=0)
    """The ratio of new to old probability counts within 1 - clip and 1 + clip."""
    clip_high: float | None = Field(None, gt=0)
    """Another upper side of the clip range; none: the same."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the loss, in ratios, where the advantage is negative; none: no bound."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL divergence from the reference, per nat."""
    target_kl: float | None = Field(None, gt=0)
    """End an iteration's policy updates when the policy has moved this far from the one that sampled, in nats per
    token; none: never."""
    ratio_limit: float = Field(10.0, gt=1)
    """A response whose mean ratio is above this carries no policy loss; counted as skipped_fraction."""
    importance_cap: float | None = Field(None, ge=1)
    """Weight tokens by trainer's over sampler's probability, at most this, for a sampler of lower precision; none: no
    weights."""

    @model_validator(mode="after")
    def several_updates(self):
        if self.epochs * self.minibatches == 1:
            refuse_unused(
                self, "target_kl", "ends an iteration's updates early, and epochs: 1 with minibatches: 1 is one"
            )
        return self


class Algorithm(Updates):
    """PPO itself."""

    value_clip: float | None = Field(0.2, gt=0)
    """The value may move this far from the old one before the larger loss counts; none: no clip. In standard
    deviations of the reward."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a token; a response's score is worth the same however long it is."""
    lambda_: float = Field(0.95, ge=0, le=1)
    """GAE's trade of bias (0) against variance (1)."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL penalty in each token's reward, in standard deviations of the reward per nat."""
    kl_target: float | None = Field(None, gt=0)
    """Adapt `kl_coef` so that the KL of a response comes to this many nats; none: it is constant."""
    kl_horizon: int = Field(10_000, ge=1)
    """Samples over which `kl_coef` is adapted."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator of the KL in the reward: k1 = log ratio (unbiased); k3 is never negative."""
    reward_clip: float | None = Field(10.0, gt=0)
    """Scores are clipped to this many standard deviations, before the KL; none: no clip."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score of a response that was cut off."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation over the batch; their mean is kept. Advantages are always
    whitened."""
    rule_coef: float = Field(0.0, ge=0)
    """Weight of the task's `rule` in the score, in addition to the reward model; 0: the rule only measures."""
    critic_warmup: int = Field(0, ge=0)
    """Number of first iterations in which only the value model is trained."""
    calibrate: int = Field(256, ge=0)
    """Samples of the initial policy whose scores' mean and deviation become 0 and 1; 0: scores stay as they are."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if self.kl_target is None:
            refuse_unused(self, "kl_horizon", "is how fast kl_coef is adapted, and without kl_target it is constant")
        if self.kl_coef == 0:
            refuse_unused(self, "kl_estimator", "estimates the KL in the reward, whose weight kl_coef is 0")
            refuse_unused(self, "kl_target", "adapts kl_coef by factors, and a kl_coef of 0 stays 0")
        return self


AlgorithmName = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"]


class GroupUpdates(Updates):
    """How the policy learns from groups of responses. Defaults are those of the papers (group_objective.py)."""

    epochs: int = Field(1, ge=1)
    """Passes over an iteration's samples, each in another order."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: each token's ratio, or the geometric mean of a response's ratios (GSPO, whose clip is about
    3e-4)."""
    average: Literal["response", "token", "constant"] | None = None
    """What the loss is averaged over: responses, each the mean of its tokens (GRPO); all tokens alike (DAPO); or the
    sum of the tokens over the number of responses times max_new_tokens (Dr. GRPO). None: response for grpo and rloo,
    constant for dr_grpo, token for reinforce_pp."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the reference, per nat; 0 needs no reference model."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where the KL counts. None: in the loss for grpo and dr_grpo, in the reward for rloo, and for reinforce_pp in the
    reward with one sample per prompt and in the loss with more."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL. None: k3 in the loss (k2 for reinforce_pp), k1 in the reward."""
    mask_truncated: bool = False
    """Responses that were cut off at max_new_tokens carry no loss (DAPO's overlong filtering)."""

    @model_validator(mode="after")
    def fitting_keys(self):
        if self.kl_coef == 0:
            refuse_unused(self, "kl_in", "says where the KL counts, and its weight kl_coef is 0")
            refuse_unused(self, "kl_estimator", "estimates the KL, whose weight kl_coef is 0")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator: k1 in the loss has an expected gradient of 0; use k2 or k3, or kl_in: reward"
            )
        if self.ratio == "sequence" and self.average not in (None, "response"):
            raise ValueError(
                f"ratio: sequence is one ratio per response and goes with average: response, not {self.average}"
            )
        return self


class Overlong(Strict):
    """DAPO's soft punishment of long responses: nothing up to `buffer` tokens before max_new_tokens, and from there on
    a share of `penalty` that grows to all of it at max_new_tokens."""

    buffer: int = Field(ge=1)
    """Tokens before max_new_tokens over which the penalty grows."""
    penalty: float = Field(1.0, gt=0)
    """Subtracted from the reward of a response of max_new_tokens."""
