"""What is normal for the numbers of a training stage: bands that follow from the run's own model and recipe, or from
publications, each with its source. docs/curves.md explains them.

    for band in bands(stage, metrics, run):
        band.metric, band.measured, band.low, band.high, band.verdict, band.source

A band says where to look. A value outside of one is no error, and inside of all of them a run can be bad.
"""

import contextlib
import json
import math
from dataclasses import dataclass, field

import numpy as np

from pipeline.core.intervals import wilson
from pipeline.report.metric_series import Metrics, Series, outliers
from pipeline.report.run_folder import Run, StageRun, is_internal

OWN = "alma"  # a rule of this project's, not of a publication
SLACK = 0.5  # nats above a uniform guess that layers of random weights add to the first loss
# Fits of the final loss in nats per token, L = E + A / N^a + B / D^b: (E, A, B, a, b)
FITS = ((1.69, 406.4, 410.7, 0.34, 0.28), (1.8172, 482.01, 2085.43, 0.3478, 0.3658))
FITTED_PARAMETERS, FITTED_TOKENS = (44e6, 16e9), (1e9, 1.4e12)
FITS_SOURCE = "Hoffmann et al. (2022), equation 10; Besiroglu et al. (2024), arXiv:2404.10102"
FIT_MARGIN = 0.15  # of the predicted loss: for another tokenizer and other text
KL_TARGET = 6.0  # nats per response (Ziegler et al., 2019)


@dataclass(frozen=True)
class Band:
    """Where a number is expected."""

    key: str
    """Of the texts in words.py that say what is measured and why the band is what it is."""
    metric: str
    """The curve that it belongs to."""
    measured: float | None
    low: float
    high: float
    source: str
    where: str = "all"
    """The part of the curve that it is about: all, first or last."""
    values: dict = field(default_factory=dict)
    """For the text."""
    interval: tuple[float, float] | None = None
    """95% interval of what was measured: it is outside only if all of that is."""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "unknown"
        least, most = self.interval or (self.measured, self.measured)
        return "inside" if most >= self.low and least <= self.high else "outside"


def bands(stage: StageRun, metrics: Metrics, run: Run) -> list[Band]:
    """The bands of a stage, as far as they can be computed from what it recorded."""
    found: list[Band] = []
    found += _first_losses(stage, metrics, run)
    found += _final_loss(stage, metrics)
    found += _schedule(stage, metrics)
    found += _gradients(stage, metrics)
    found += _spikes(metrics)
    found += _throughput(metrics)
    found += _ends_of_turns(stage, metrics)
    found += _policy(stage, metrics, run)
    return found


# ---- losses ----------------------------------------------------------------------------------------------------------


def _first_losses(stage: StageRun, metrics: Metrics, run: Run) -> list[Band]:
    first = metrics.first("heldout_loss")
    if first is None:
        first = metrics.first("loss")
    if stage.kind == "pretrain" and "model" not in stage.parents:
        shape = model_shape(stage, run)
        if shape is None:
            return []
        uniform = math.log(shape["vocab_size"])
        spread = shape["hidden_size"] * shape["initializer_range"] ** 2 / 2
        values = {"vocab": shape["vocab_size"], "uniform": uniform, "spread": spread + SLACK}
        high = uniform + spread + SLACK
        source = "Karpathy (2019), A Recipe for Training Neural Networks"
        return [Band("first_loss", "loss", first, uniform - 0.1, high, source, "first", values)]
    if stage.kind in ("sft", "pretrain"):
        shape = model_shape(stage, run)
        if shape is None:
            return []
        uniform = math.log(shape["vocab_size"])
        values = {"vocab": shape["vocab_size"], "uniform": uniform}
        return [Band("first_loss_trained", "loss", first, 0.0, uniform, OWN, "first", values)]
    if stage.kind == "dpo" and stage.config.get("loss", "sigmoid") in ("sigmoid", {"sigmoid": 1.0}):
        source = "Rafailov et al. (2023), equation 7"
        return [Band("first_loss_dpo", "loss", metrics.first("loss"), 0.683, 0.703, source, "first")]
    if stage.kind == "reward":
        return [Band("first_loss_reward", "loss", first, 0.6, 0.9, "Bradley & Terry (1952)", "first")]
    return []


def model_shape(stage: StageRun, run: Run) -> dict | None:
    """vocab_size, hidden_size and initializer_range of a stage's model, or None. From its published config.json, else
    from what it is made from."""
    folders = [stage.path / "model"] if stage.path else []
    vocabulary = None
    for key, parent in stage.parents.items():
        made = run.stages.get(parent.get("stage", ""))
        if not is_internal(parent) or made is None or made.path is None:
            continue
        if key in ("model", "policy"):
            folders.append(made.path / "model")
        vocabulary = made.metrics.get("vocab_size", vocabulary)
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return _shape(config["vocab_size"], config)
    recipe = stage.config.get("model") or {}
    if vocabulary is None or "hidden_size" not in recipe:
        return None
    return _shape(vocabulary, recipe)


def _shape(vocabulary: int, config: dict) -> dict:
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0
    deviation = config.get("initializer_range") or 0.02
    return {"vocab_size": int(vocabulary), "hidden_size": float(hidden), "initializer_range": float(deviation)}


def _final_loss(stage: StageRun, metrics: Metrics) -> list[Band]:
    if stage.kind != "pretrain" or not stage.is_published or "model" in stage.parents:
        return []
    size, tokens = stage.metrics.get("parameters"), stage.metrics.get("tokens")
    if not size or not tokens:
        return []
    in_range = FITTED_PARAMETERS[0] <= size <= FITTED_PARAMETERS[1] and FITTED_TOKENS[0] <= tokens <= FITTED_TOKENS[1]
    if not in_range:
        return []
    predicted = [base + a / size**alpha + b / tokens**beta for base, a, b, alpha, beta in FITS]
    low, high = min(predicted) * (1 - FIT_MARGIN), max(predicted) * (1 + FIT_MARGIN)
    measured = stage.metrics.get("loss_after")
    return [Band("final_loss", "loss", measured, low, high, FITS_SOURCE, "last", {"size": size, "tokens": tokens})]


# ---- steps -----------------------------------------------------------------------------------------------------------


def planned_rates(stage: StageRun, steps: Series | None) -> Series | None:
    """The learning rates that the recipe plans at these steps, or None where its length is not known from it."""
    config = stage.config
    last, schedule = config.get("steps") or stage.metrics.get("steps"), dict(config.get("schedule") or {})
    rate = (config.get("optimizer") or {}).get("lr")
    unknown = config.get("time") or config.get("from_step") or schedule.get("warmup_tokens")
    if steps is None or not last or not rate or not schedule or unknown:
        return None
    from pipeline.train.config import Schedule
    from pipeline.train.schedule import learning_rate

    ratio = schedule.get("warmup_ratio")
    if ratio:
        schedule["warmup_steps"] = math.ceil(ratio * last)
    # every key is written out in a record, and was checked when the stage started
    plan = Schedule.model_construct(**{key: schedule.get(key) for key in Schedule.model_fields})
    values = [learning_rate(plan, rate, int(step) - 1, last) for step in steps.steps]
    return Series(steps.steps, np.array(values))


def _schedule(stage: StageRun, metrics: Metrics) -> list[Band]:
    logged = metrics.series.get("lr")
    planned = planned_rates(stage, logged)
    if planned is None or not len(planned):
        return []
    scale = max(float(np.abs(planned.values).max()), 1e-30)
    difference = float(np.abs(logged.values - planned.values).max()) / scale
    return [Band("schedule", "lr", difference, 0.0, 1e-6, OWN)]


def _gradients(stage: StageRun, metrics: Metrics) -> list[Band]:
    norms = metrics.series.get("grad_norm")
    limit = (stage.config.get("optimizer") or {}).get("max_grad_norm")
    if norms is None or not limit or len(norms) < 2:
        return []
    median = float(np.median(norms.values[len(norms) // 2 :]))
    values = {"limit": limit, "share": float((norms.values > limit).mean())}
    return [Band("gradients", "grad_norm", median, 0.0, limit, "Pascanu et al. (2013); " + OWN, "all", values)]


def _spikes(metrics: Metrics) -> list[Band]:
    losses = metrics.series.get("loss")
    if losses is None or len(losses) < 128:
        return []
    number = len(outliers(losses)) + len(metrics.refused)
    return [Band("spikes", "loss", float(number), 0.0, 0.0, "Hampel (1974); docs/running.md")]


def rate_name(metrics: Metrics) -> str | None:
    """tok_per_second, pairs_per_second, ..."""
    return next((name for name in metrics.series if name.endswith("_per_second")), None)


def _throughput(metrics: Metrics) -> list[Band]:
    found = []
    name = rate_name(metrics)
    rates = metrics.series[name].values[1:] if name else []  # the first line includes loading of kernels
    if len(rates) >= 10:
        ratio = float(np.quantile(rates, 0.1) / max(np.median(rates), 1e-9))
        found.append(Band("throughput", name, ratio, 0.7, 1.0, OWN))
    return found


# ---- answers and policies --------------------------------------------------------------------------------------------


def _ends_of_turns(stage: StageRun, metrics: Metrics) -> list[Band]:
    if stage.kind != "sft":
        return []
    rate, answered = metrics.last("heldout_eos_rate"), metrics.last("heldout_answered")
    if rate is None or not answered:
        return []
    values = {"answered": int(answered)}
    return [Band("eos", "heldout_eos_rate", rate, 0.9, 1.0, OWN, "last", values, wilson(rate, int(answered)))]


def _policy(stage: StageRun, metrics: Metrics, run: Run) -> list[Band]:
    """Of reinforcement learning."""
    if "rollout_difference" not in metrics.series:
        return []
    options = stage.config.get("ppo") or {}
    target = options.get("kl_target") or KL_TARGET
    ziegler, trl = "Ziegler et al. (2019)", "TRL, PPO trainer, debugging"
    found = []
    if "kl" in metrics.series:
        found.append(Band("kl", "kl", metrics.last("kl"), -0.1, 2 * target, ziegler, "last", {"target": target}))
    if "first_approx_kl" in metrics.series:
        worst = float(np.abs(metrics.series["first_approx_kl"].values).max())
        found.append(Band("first_ratio", "first_approx_kl", worst, 0.0, 0.01, "docs/ppo.md"))
    is_ahead = (stage.config.get("rollout") or {}).get("ahead")  # then it is also what updates have changed
    if "rollout_difference_max" in metrics.series and not is_ahead:
        worst = float(metrics.series["rollout_difference_max"].values.max())
        found.append(Band("sampler", "rollout_difference_max", worst, 0.0, 0.1, "docs/ppo.md"))
    if "approx_kl" in metrics.series:
        source = "Spinning Up in Deep RL, PPO, target_kl"
        found.append(Band("approx_kl", "approx_kl", metrics.last("approx_kl"), -0.001, 0.05, source))
    if "ratio_mean" in metrics.series:
        found.append(Band("ratio", "ratio_mean", metrics.last("ratio_mean"), 0.8, 1.2, trl))
    shape = model_shape(stage, run)
    if "entropy" in metrics.series and shape:
        first, most = metrics.first("entropy"), math.log(shape["vocab_size"])
        source = "Yu et al. (2025), DAPO, arXiv:2503.14476; " + OWN
        low = 0.1 * min(first, most)
        found.append(Band("entropy", "entropy", metrics.last("entropy"), low, most, source, "all", {"first": first}))
    if "eos_rate" in metrics.series:
        found.append(Band("policy_eos", "eos_rate", metrics.last("eos_rate"), 0.8, 1.0, OWN, "last"))
    if "explained_variance" in metrics.series:
        measured = metrics.last("explained_variance")
        found.append(Band("critic", "explained_variance", measured, 0.0, 1.0, OWN, "last"))
    return found
