"""Texts of example sources, from which the models of a recipe are trained."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.terminal import plural

if TYPE_CHECKING:
    from pipeline.data.sources.sources import Source

FEWEST = 10  # texts from which a model is trained


def changed_keys(block: Strict) -> list[str]:
    """Keys that differ from their defaults. Not those that were written: a resolved recipe writes all of them."""
    return [key for key, field in type(block).model_fields.items() if getattr(block, key) != field.default]


def example_texts(examples: "dict[str, Source]", names: list[str], most: int, where: str) -> list[str]:
    """Normalised texts of these sources, the first `most`. Raises UserError, which begins with `where`, if they are too
    few."""
    from pipeline.data.cleaning.normal_form import normalise
    from pipeline.data.sources.csv_files import REPEATED
    from pipeline.data.sources.formats import Bad
    from pipeline.data.sources.records import read, text_of
    from pipeline.data.sources.sources import needed_fields
    from pipeline.data.sources.templates import MissingField

    texts = []
    for name in names:
        source = examples[name]
        for item in read(source, name, "examples", needed_fields(source)):
            if isinstance(item, Bad):
                if item.reason == REPEATED:  # an entire file
                    raise UserError(f"examples.{name}: {item.place}: {item.reason} ({item.raw})")
                continue
            try:
                text = normalise(text_of(source, item).encode(errors="replace").decode())
            except MissingField:
                continue
            if text:
                texts.append(text)
            if len(texts) >= most:
                return texts
    if len(texts) < FEWEST:
        raise UserError(
            f"{where}: {', '.join(names)} gave {plural(len(texts), 'text')}, expected at least {FEWEST}; look at the"
            " sources' `text`"
        )
    return texts


def save_model(path: Path, **arrays) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())
