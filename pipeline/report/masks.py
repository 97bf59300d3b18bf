"""Rows of the finetuning stages as tokens with roles and loss, for the page: those of `alma inspect masks`, made with
the tokenizer that the run has and the first records of its sources. Nothing is downloaded."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.recipe import Recipe, load
from pipeline.data.chat.token_view import Token
from pipeline.report.run_folder import Run, StageRun, is_internal

MOST_ROWS = 2  # records of a source
MOST_SOURCES = 4
MOST_TOKENS = 400  # of a row that are shown


@dataclass(frozen=True)
class MaskedRow:
    """One row that a stage reads."""

    source: str
    place: str
    title: str
    """Which row of the record it is; empty for the only one."""
    tokens: list[Token]
    count: int
    trained: int


@dataclass
class StageMasks:
    """Rows of one stage."""

    stage: str
    rows: list[MaskedRow] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Sources whose records are not on this machine."""
    problem: str = ""
    """Why there are no rows, in one sentence."""


def masks(run: Run) -> list[StageMasks]:
    """Of each finetuning stage of the run's newest recipe that has learned from conversations, pairs or prompts."""
    if run.recipe is None:
        return []
    from pipeline.checks.inspect_masks import KINDS

    names = [stage.name for stage in run.stages.values() if stage.kind in KINDS and stage.path]
    if not names:
        return []
    try:
        recipe = load(run.recipe)
    except UserError as error:
        return [StageMasks(names[0], problem=str(error).splitlines()[0])]
    return [_of_stage(run, run.stages[name], recipe) for name in names if name in recipe.stages]


def _of_stage(run: Run, stage: StageRun, recipe: Recipe) -> StageMasks:
    from pipeline.checks.inspect_masks import check, rows_with
    from pipeline.data.chat.named_templates import with_template
    from pipeline.data.chat.template import Chat
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    found = StageMasks(stage.name)
    config = recipe.stages[stage.name]
    folder = tokenizer_folder(run, stage)
    if folder is None:
        found.problem = "the tokenizer of its model is not in this run"
        return found
    try:
        tokenizer, _ = with_template(load_tokenizer(folder), config.chat_template, config.chat_template_kwargs)
        rows = rows_with(Chat(tokenizer, date=config.date), config)
        for name in list(rows.sources)[:MOST_SOURCES]:
            if not _is_here(rows.sources[name]):
                found.absent.append(name)
                continue
            for shown in check(rows, name, MOST_ROWS).shown[:MOST_ROWS]:
                trained = sum(token.loss > 0 for token in shown.tokens)
                row = MaskedRow(name, shown.place, shown.title, shown.tokens[:MOST_TOKENS], len(shown.tokens), trained)
                found.rows.append(row)
    except UserError as error:
        found.problem = str(error).splitlines()[0]
    return found


def tokenizer_folder(run: Run, stage: StageRun) -> Path | None:
    """A folder in the run with the tokenizer and chat template that a stage's rows are written with."""
    folders = [stage.path / "model"] if stage.path else []
    for parent in stage.parents.values():
        made = run.stages.get(parent.get("stage", ""))
        if is_internal(parent) and made and made.path:
            folders.append(made.path / "model")
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder
    return None


def _is_here(source) -> bool:
    """Whether the records of a source can be read without a network."""
    from pipeline.data.sources.packages import cached

    if source.package:
        return all(cached(member, sha256) for member, sha256 in source.members.items())
    with contextlib.suppress(UserError):
        return source.is_here()
    return False
