"""The measures of stage assess: losses on held-out text, answers with their rewards and rule scores, win rates."""

import math

from pipeline.assessment.inputs import Candidate
from pipeline.assessment.probes import Probes
from pipeline.assessment.win_rates import interval
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.seeds import derive


def measure(
    candidate: Candidate, rows: list | None, prompts: list, config, judge, reward_model: Artifact | None, probes: Probes
) -> dict:
    """All measures of one model by itself: held-out text, answers, their rewards and rule scores, and its probes."""
    from pipeline.core.distributed import device
    from pipeline.models.build import load

    model = load(candidate.folder).to(device()).eval()
    result: dict = {}
    if rows is not None:
        result = text_loss(model, rows, config.batch)
    result.update(probes.measure(model, candidate, config))
    texts, rewards, rules = [], [], []
    if prompts:
        prompt_ids, completions, answer_measures = _answers(model, candidate, prompts, config)
        result.update(answer_measures)
        texts = _texts(candidate, completions)
        for text, prompt in zip(texts, prompts, strict=True):
            if prompt.answer is not None:
                rules.append(_rule_score(config.rule, text, prompt.answer))
        if judge is not None:
            judge_rows = [ids + completion.ids for ids, completion in zip(prompt_ids, completions, strict=True)]
            if not judge.reads_like(candidate.chat):
                judge_rows = []
                for prompt, text, completion in zip(prompts, texts, completions, strict=True):
                    judge_rows.append(judge.answered(prompt.messages, text, completion.stopped))
            rewards = judged(judge_rows, reward_model, config)
            result["reward"] = sum(rewards) / len(rewards)
        if rules:
            result["rule"] = sum(rules) / len(rules)
    result["texts"] = [text.strip() for text in texts]
    result["rewards"] = rewards
    result["rules"] = rules
    return result


def text_loss(model, rows: list, batch: int) -> dict:
    """Bits per byte (nats / ln 2 / bytes of text) and perplexity (per token) on fixed held-out rows."""
    import torch

    from pipeline.core.distributed import device
    from pipeline.train.loss import cross_entropy_sum

    nats, num_tokens, num_bytes = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            ids = torch.tensor([row.tokens.tolist() for row in part], device=device())
            nats += cross_entropy_sum(model(input_ids=ids[:, :-1]).logits, ids[:, 1:]).item()
            num_tokens += ids[:, 1:].numel()
            num_bytes += sum(row.bytes for row in part)
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "perplexity": math.exp(nats / num_tokens),
        "heldout_tokens": num_tokens,
        "heldout_bytes": num_bytes,
    }


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answers(model, candidate: Candidate, prompts: list, config) -> tuple[list[list[int]], list, dict]:
    """(ids of the prompts, completions, measures)."""
    from pipeline.models.publish import stop_ids
    from pipeline.rl.rollout import generate

    prompt_ids = [candidate.chat.prompt(prompt.messages) for prompt in prompts]
    stops = stop_ids(candidate.folder, candidate.tokenizer)
    completions = generate(
        model,
        prompt_ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=stops,
        pad_id=candidate.tokenizer.pad_token_id,
        seeds=[derive(config.seed, "answer", prompt.id) for prompt in prompts],
        batch=config.batch,
    )
    end_of_turn_rate = None  # a model without an end of answers always writes as many tokens as it may
    if stops:
        end_of_turn_rate = sum(completion.stopped for completion in completions) / len(completions)
    num_tokens = sum(len(completion.ids) for completion in completions)
    measures = {"end_of_turn_rate": end_of_turn_rate, "answer_tokens": num_tokens / len(completions)}
    return prompt_ids, completions, measures


def _texts(candidate: Candidate, completions: list) -> list[str]:
    """The answers without the token that ended them."""
    texts = []
    for completion in completions:
        ids = completion.ids[: len(completion.ids) - completion.stopped]
        texts.append(candidate.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def _rule_score(rule: str, text: str, answer: str) -> float:
    from pipeline.rl.rules import score

    return score(rule, text.strip(), answer)


def judged(rows: list[list[int]], reward_model: Artifact, config) -> list[float]:
    """The reward model's score of each row of its own tokens. Raises UserError for rows that are longer than its
    positions."""
    from pipeline.core.distributed import device
    from pipeline.models.build import load
    from pipeline.models.families import positions
    from pipeline.train.finetune_data import model_folder
    from pipeline.train.scores import reward_scores

    folder = model_folder(reward_model)
    model = load(folder, head="judge").to(device()).eval()
    longest, most = max(len(row) for row in rows), positions(model.config)
    if most and longest > most:
        raise UserError(
            f"inputs.reward: an answer has {longest} tokens with its prompt, the reward model in {folder} has positions"
            f" for {most}; use a smaller max_new_tokens (now {config.max_new_tokens}), or shorter prompts"
        )
    return reward_scores(model, rows, config.batch).tolist()


def win_rate(ours: list[float], theirs: list[float], config, name: str) -> dict:
    """Share of prompts on which ours has the higher reward, with a 95% interval; equal rewards count half."""
    outcomes = []
    for mine, other in zip(ours, theirs, strict=True):
        outcomes.append(0.5 if mine == other else float(mine > other))
    return interval(outcomes, config, name)
