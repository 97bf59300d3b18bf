"""Chat templates by name, for models that have none: `chat_template: chatml`. The files are in templates/.

    tokenizer, added = with_template(load_tokenizer(folder), "chatml", {})
    save_tokenizer(tokenizer, folder, target, bool(added))

A template's own tokens (<|im_end|>) that a tokenizer lacks are added to it as special tokens. What a new token's row in
the embedding begins with is the mean of the rows of the pieces that its text had before (models/vocabulary.py).
"""

import json
import re
import shutil
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.recipe_file import suggestion
from pipeline.data.chat.rendering import Template
from pipeline.data.tokenizer.tokenizer_folder import CONFIG, FILES, read_object, save

FOLDER = Path(__file__).with_name("templates")
FILE = "chat_template.jinja"
# What marks a turn in a template: <|im_end|>, <|user|>, <start_of_turn>, <｜Assistant｜>
MARK = re.compile(r"<\|[A-Za-z0-9_]+\|>|<(?:start|end)_of_turn>|<｜[^<>{}'\"]{1,30}｜>")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def template_file(name: str) -> Path | None:
    """The file of a template that is not one of `names`: a path, or in the folder of a model. Raises UserError."""
    if name in names():
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise UserError(
            f"chat_template: there is no file {path}, and no template is called {name!r}: {suggestion(name, names())}"
        )
    return path


def source_of(name: str) -> str:
    """The text of a template: one of `names`, a file, or in the folder of a model. Raises UserError."""
    path = template_file(name) or FOLDER / f"{name}.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"chat_template: {path} is not UTF-8 text; expected a Jinja template") from None


def with_template(tokenizer, name: str | None, variables: dict) -> tuple[object, dict[int, list[int]]]:
    """(a tokenizer with the template `name`, or with its own for None, in which `variables` have these values unless a
    conversation gives others; the tokens that were added to it: id -> ids of what their text was before). Changes the
    tokenizer. Raises UserError."""
    source = tokenizer.chat_template if name is None else source_of(name)
    if isinstance(source, dict):
        source = tokenizer.get_chat_template()
    added: dict[int, list[int]] = {}
    if name is not None:
        added = _add_marks(tokenizer, source)
    tokenizer.chat_template = source
    if variables:
        known = Template(tokenizer).variables
        for variable in variables:
            if variable not in known:
                raise UserError(
                    f"chat_template_kwargs: the chat template does not know {variable!r}; it reads"
                    f" {', '.join(sorted(known))}"
                )
        tokenizer.chat_template = _defaults(variables) + source
    return tokenizer, added


def _defaults(variables: dict) -> str:
    """Lines in front of a template that give variables their values."""
    lines = ""
    for variable, value in variables.items():
        literal = json.dumps(value, ensure_ascii=False)
        lines += f"{{%- set {variable} = {variable} if {variable} is defined else {literal} %}}"
    return lines + "{{ '' }}"  # else a newline that the template begins with would belong to the line


def _add_marks(tokenizer, source: str) -> dict[int, list[int]]:
    """Add the marks of turns that a template writes and that a tokenizer has not got as tokens."""
    from tokenizers import AddedToken

    marks = dict.fromkeys(MARK.findall(source))
    added = set(tokenizer.added_tokens_encoder)
    missing = [mark for mark in marks if mark not in added]
    pieces = [tokenizer.encode(mark, add_special_tokens=False) for mark in missing]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(mark, special=True, normalized=False) for mark in missing]},
        replace_extra_special_tokens=False,
    )
    return dict(zip(tokenizer.convert_tokens_to_ids(missing), pieces, strict=True))


def save_tokenizer(tokenizer, parent: Path, folder: Path, has_new_tokens: bool) -> None:
    """Write the files of a tokenizer with another chat template than that of the folder `parent`."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    if has_new_tokens:
        model = parent / "tokenizer.model"
        save(tokenizer, folder, model.read_bytes() if model.is_file() else None)
        return
    for name in FILES:
        if (parent / name).is_file():
            shutil.copyfile(parent / name, folder / name)
    config = read_object(folder / CONFIG)
    if config.pop("chat_template", None) is not None:
        write_json(folder / CONFIG, config)
    (folder / FILE).write_text(tokenizer.chat_template, encoding="utf-8")
