"""How long a run is. A recipe says it in steps, tokens, tokens per parameter, or wall-clock time; a run counts steps.

Time becomes steps once the first steps have been timed. What was found is written to horizon.json in the run's folder,
whole or not at all, before the next step: a run that is killed and resumed reads it, and so ends where it would have
ended. Learning rates of the steps before do not depend on it.
"""

import json

from pipeline.core.config import seconds_of
from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.output import Output
from pipeline.train.config import Schedule

FILE = "horizon.json"
KINDS = ("steps", "tokens", "tokens_per_parameter", "time")
CALIBRATION = 20  # steps after which a rate is believed
FEWEST = 8  # of them made by this process: a resumed one has to warm up too


def in_steps(config, parameters: int):
    """`config` with `steps` and `warmup_steps`, where the recipe gives tokens. Rounded up: no fewer tokens than were
    asked for. `time` leaves steps open."""
    step = config.batch_size * config.sequence_length
    tokens = config.tokens if config.tokens_per_parameter is None else round(config.tokens_per_parameter * parameters)
    schedule: Schedule = config.schedule
    if schedule.warmup_tokens is not None:
        schedule = schedule.model_copy(
            update={"warmup_steps": -(-schedule.warmup_tokens // step), "warmup_tokens": None}
        )
    return config.model_copy(
        update={"steps": config.steps if tokens is None else -(-tokens // step), "schedule": schedule}
    )


class Horizon:
    """steps: how many there are, None as long as a time has not become steps. hold: steps whose learning rate must
    not depend on it."""

    def __init__(self, config, output: Output, start: int):
        from pipeline.train import distributed

        self.steps, self.hold = config.steps, 0
        self.output, self.config = output, config
        self.seconds = seconds_of(config.time) if config.steps is None else None
        if self.seconds is not None:
            path = output.path / FILE
            found = distributed.from_main(json.loads(path.read_text()) if output.is_main and path.exists() else None)
            self.hold = max(CALIBRATION, start + FEWEST)
            if found:
                self.steps, self.hold = found["steps"], found["hold"]
        if self.steps is not None and start > self.steps:
            raise UserError(
                f"stage {config.kind}: its checkpoint is at step {start}, and the recipe's horizon is {self.steps}"
                " steps; give a longer one, or --restart to begin anew"
            )

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        from pipeline.train.schedule import learning_rate

        # An unknown end is never reached while `hold` lasts.
        return learning_rate(self.config.schedule, self.config.optimizer.lr, step, self.steps or 2**62, self.hold)

    def settle(self, step: int, step_seconds: float | None, evaluation: float) -> str | None:
        """After `step`, turn the time that is left into steps. Collective at the step where it happens; returns a line
        for the user then.

        step_seconds: of the steps so far; evaluation: seconds of one evaluation on held-out data.
        """
        from pipeline.train import distributed

        if self.steps is not None or step < self.hold or step_seconds is None:  # a rollback begins to time anew
            return None
        self.hold = step
        often = self.config.evaluate_every
        each = step_seconds + (evaluation / often if often else 0.0)
        left = self.seconds - self.output.spent() - evaluation if self.output.is_main else 0.0
        self.steps = distributed.from_main(step + max(1, int(left / each)))
        if self.output.is_main:
            write_json(
                self.output.path / FILE,
                {
                    "steps": self.steps,
                    "hold": self.hold,
                    "time": self.config.time,
                    "seconds_per_step": each,
                    "seconds_left": left,
                },
            )
        return (
            f"time       {self.config.time} is {self.steps:,} steps: {each:.3g} s a step"
            f" measured{' with evaluations' if often else ''}, {max(left, 0):,.0f} s left after step {step}; kept in"
            f" {FILE}"
        )
