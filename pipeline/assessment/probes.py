"""What is measured of a model by having it write: speed and memory, memorised text, refusals. Each is a block of stage
assess, and its absence leaves it out."""

from dataclasses import dataclass, field

from pipeline.assessment.generation_speed import measure_speed
from pipeline.assessment.inputs import Candidate, check_tokens
from pipeline.assessment.memorisation import Place, measure_memorised, places_of
from pipeline.assessment.refusals import Request, measure_refusals, prompts_of, requests_of
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.seeds import derive


@dataclass(frozen=True)
class Probes:
    """What every model is asked, the same for all."""

    places: dict[str, list[Place]] = field(default_factory=dict)
    """By split; empty without `memorised`."""
    requests: list[Request] = field(default_factory=list)
    """Empty without `refusals`."""

    def measure(self, model, candidate: Candidate, config) -> dict:
        """Figures by name of the block; of `refusals` also every answer, under `refusal_answers`. model: loaded."""
        figures: dict = {}
        if self.places:
            figures["memorised"] = measure_memorised(model, candidate.tokenizer, self.places, config.batch)
        if self.requests:
            measured = measure_refusals(model, candidate, self.requests, config.refusals, config.batch)
            figures["refusals"], figures["refusal_answers"] = measured
        if config.speed:
            seed = derive(config.seed, "speed")
            figures["speed"] = measure_speed(model, candidate.vocabulary, config.speed, seed)
        return figures


def prepare(config, tokens: Artifact | None, candidates: list[Candidate]) -> Probes:
    """Raises UserError for what a model cannot be asked, before any is measured."""
    places: dict[str, list[Place]] = {}
    requests: list[Request] = []
    if config.memorised:
        block = config.memorised
        _check_positions(candidates, block.prefix + block.continuation, "memorised: prefix + continuation are")
        check_tokens(tokens, candidates)
        places = places_of(tokens, block, config.seed)
    if config.refusals:
        requests = requests_of(config.refusals)
        for candidate in candidates:
            prompts_of(candidate, requests, config.refusals.max_new_tokens)
    if config.speed:
        length = config.speed.prompt_tokens + config.speed.new_tokens
        _check_positions(candidates, length, "speed: prompt_tokens + new_tokens are")
    return Probes(places, requests)


def _check_positions(candidates: list[Candidate], length: int, subject: str) -> None:
    for candidate in candidates:
        if candidate.positions and length > candidate.positions:
            raise UserError(
                f"{subject} {length}, more than the {candidate.positions} positions of {candidate.name}; use smaller"
                " numbers"
            )


def headline(name: str, result: dict) -> str | None:
    """One measure of a model for the closing table, None if no block measured it."""
    if "memorised" in result:
        share = result["memorised"]["train"]
        return f"{name} {share['rate']:.0%} memorised (n={share['n']})"
    if "refusals" in result:
        kind, share = next(iter(result["refusals"].items()))
        return f"{name} refuses {share['rate']:.0%} of {kind} requests (n={share['n']})"
    if "speed" in result:
        batch, figures = next(iter(result["speed"]["batches"].items()))
        return f"{name} {figures['tokens_per_second']:,.0f} tokens/s (batch {batch})"
    return None
