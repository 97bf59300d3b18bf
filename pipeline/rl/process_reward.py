"""A process reward model (stage prm) as a reward of ppo and grpo: one score for a response, made of the probabilities
that its steps are right.

The score is the smallest of them, or their product. Both are how process reward models rank whole answers (Lightman et
al., 2023, appendix F; Wang et al., 2024: the smallest). Rewards at the end of each step, which add up, are not offered:
a policy learns to write many steps that score well and no solution, and training collapses (Cheng et al., 2025,
arXiv:2504.15275, which takes the minimum).
"""

import math

from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat
from pipeline.rl.frozen_models import complete
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample
from pipeline.train.scores import step_scores

COMBINE = {"minimum": min, "product": math.prod}


class ProcessReward:
    """model: on the device (frozen_models.only_read). chat: its own. separator: between the steps of an answer."""

    def __init__(self, model, chat: Chat, separator: str):
        self.model, self.chat, self.separator = model, chat, separator

    def steps(self, models, samples: list[Sample], tasks: list[Task]) -> list[list[float] | str]:
        """The probability that each step of a response is right, or why the model cannot read the response. A response
        without text, or one that was cut off, has one step, which is wrong: a step that never ends must not be a way to
        be judged by the others alone. models: of the run (experience.Models). Collective."""
        results: list[list[float] | str] = [[0.0]] * len(samples)
        readable, answers = [], []
        for index, (sample, task) in enumerate(zip(samples, tasks, strict=True)):
            text = models.text(sample).strip()  # many templates strip answers
            pieces = pieces_of(text, self.separator)
            if sample.stopped and pieces:
                asked = task.dialogue
                messages = [*asked.messages, {"role": "assistant", "content": text}]
                readable.append(index)
                answers.append((Dialogue(messages, asked.tools, asked.options), pieces))
        rows = self.chat.steps(answers)
        good = [row for row in rows if not isinstance(row, str)]
        with complete(self.model) as model, models.autocast():
            scores = iter(step_scores(model, good, models.config.rollout.batch) if good else [])
        for index, row in zip(readable, rows, strict=True):
            results[index] = row if isinstance(row, str) else next(scores)
        return results


def pieces_of(text: str, separator: str) -> list[str]:
    """The steps of a text, each but the last with the separator behind it, as the stage prm reads answers. Steps
    without text belong to the one before; those in front of all text, to the first."""
    pieces: list[str] = []
    begin = ""
    parts = text.split(separator)
    for number, part in enumerate(parts):
        piece = part if number == len(parts) - 1 else f"{part}{separator}"
        if part.strip():
            pieces.append(f"{begin}{piece}")
            begin = ""
        elif pieces:
            pieces[-1] += piece
        else:
            begin += piece
    return pieces
