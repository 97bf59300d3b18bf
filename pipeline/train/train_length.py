"""How long a run is. A recipe gives steps, tokens, tokens per parameter, or wall-clock time; a run counts steps.

Time becomes steps once the first steps have been timed. The result is written to horizon.json in the run's folder,
completely or not at all, before the next step: a run that is killed and resumed reads it, so it ends where it would
have ended. Learning rates of the steps before do not depend on it."""

import json

from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.output import Output
from pipeline.core.run_config import seconds_of
from pipeline.core.terminal import plural, say
from pipeline.train.config import Schedule

FILE = "horizon.json"
KINDS = ("steps", "tokens", "tokens_per_parameter", "time")
CALIBRATION = 20  # steps after which the measured rate is used
FEWEST = 8  # of them made by this process, because a resumed one has to warm up too


def in_steps(config, parameters: int):
    """`config` with `steps` and `warmup_steps` if the recipe gives tokens. Rounded up: never fewer tokens than asked
    for. With `time`, steps stay None."""
    warmup = {"warmup_steps": config.warmup_steps(), "warmup_tokens": None}
    schedule: Schedule = config.schedule.model_copy(update=warmup)
    tokens = config.tokens
    if config.tokens_per_parameter is not None:
        tokens = round(config.tokens_per_parameter * parameters)
    steps = config.steps if tokens is None else -(-tokens // config.step_tokens)
    return config.model_copy(update={"steps": steps, "schedule": schedule})


def say_warnings(before, after) -> None:
    """Print what only the length in steps shows: warnings of config `after` that `before` did not have."""
    known = before.warnings()
    for warning in after.warnings():
        if warning not in known:
            say(f"{after.kind}: WARNING: {warning}")


class TrainingLength:
    """steps: how many a run has, None until a time has become steps. hold: steps whose learning rate must not depend on
    that number."""

    def __init__(self, config, output: Output, start: int):
        from pipeline.core import distributed

        self.steps, self.hold = config.steps, 0
        self.output, self.config = output, config
        self.seconds = seconds_of(config.time) if config.steps is None else None
        if self.seconds is not None:
            self.hold = max(CALIBRATION, start + FEWEST)
            path = output.path / FILE
            saved = json.loads(path.read_text()) if output.is_main and path.exists() else None
            saved = distributed.from_main(saved)
            if saved:
                self.steps, self.hold = saved["steps"], saved["hold"]
        if self.steps is not None and start > self.steps:
            raise UserError(
                f"stage {config.kind}: its checkpoint is at step {start}, and the recipe asks for"
                f" {plural(self.steps, 'step')}; ask"
                " for more, or start again with --restart"
            )

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        from pipeline.train.schedule import learning_rate

        # An unknown end is never reached before `hold`.
        return learning_rate(self.config.schedule, self.config.optimizer.lr, step, self.steps or 2**62, self.hold)

    def settle(self, step: int, step_seconds: float | None, evaluation_seconds: float) -> str | None:
        """After `step`, turn the remaining time into steps when enough steps have been timed, and return a line for the
        user; otherwise None. Collective at that step.

        step_seconds: mean of the steps so far, None if they are being timed again after a rollback.
        """
        from pipeline.core import distributed

        if self.steps is not None or step < self.hold or step_seconds is None:
            return None
        self.hold = step
        every = self.config.evaluate_every
        seconds_per_step = step_seconds + (evaluation_seconds / every if every else 0.0)
        left = self.seconds - self.output.spent() - evaluation_seconds if self.output.is_main else 0.0
        self.steps = distributed.from_main(step + max(1, int(left / seconds_per_step)))
        if self.output.is_main:
            record = {
                "steps": self.steps,
                "hold": self.hold,
                "time": self.config.time,
                "seconds_per_step": seconds_per_step,
                "seconds_left": left,
            }
            write_json(self.output.path / FILE, record)
        return (
            f"time       {self.config.time} is {self.steps:,} steps: {seconds_per_step:.3g} s per step"
            f" measured{' with evaluations' if every else ''}, {max(left, 0):,.0f} s left after step {step}; recorded"
            " in"
            f" {FILE}"
        )
