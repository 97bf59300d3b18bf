"""Models: from a recipe's `model` block, from a folder, and back into one.

Everything is a `transformers` model in the Hugging Face layout, so that what a stage publishes is read by
from_pretrained, vLLM, lm-eval and TRL. Initial weights are a function of (seed, module name) alone, so that they do not
depend on how a model is cut up or in which order it is built.
"""

import contextlib
import difflib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import Problems, UserError
from pipeline.core.recipe_file import shown
from pipeline.core.seeds import derive
from pipeline.models import mup
from pipeline.models.transformers_4 import add_older_keys

# Keys of a model block that a recipe leaves to others: the tokenizer, the stage, and this module.
TAKEN = {
    "vocab_size": "the tokenizer decides it; `pad_vocab_to: 128` rounds it up",
    "max_position_embeddings": "it is the stage's sequence_length",
    "bos_token_id": "the tokenizer decides it",
    "eos_token_id": "the tokenizer decides it",
    "pad_token_id": "the tokenizer decides it",
    "model_type": "write `family`",
    "architectures": "`family` decides it",
    "dtype": "weights are fp32 and `precision` says how they are used",
    "torch_dtype": "weights are fp32 and `precision` says how they are used",
}
# Keys that say how large something is, of which a model has at least one; and what no model has yet.
SIZES = re.compile(
    r"(hidden_size|n_embd|d_model|intermediate_size|n_inner|head_dim|n_head|n_layer|num_layers|num_hidden_layers"
    r"|num_heads|num_attention_heads|num_key_value_heads)"
)
LARGEST_SIZE, MOST_LAYERS = 10_000_000, 10_000
OWN = ("family", "pad_vocab_to", "init", "mup")
# Keys that a family's code reads (qwen3_moe), or train/balance.py does (DeepSeek-V3), and that its configuration class
# does not list.
UNLISTED = {"qwen3_moe": ("head_dim",), "deepseek_v3": ("router_aux_loss_coef",)}
# Families that read the borders of documents off the positions, so that no token sees another document. Seen to leak:
# openai-gpt, opt, bloom, mamba, mamba2, rwkv.
DOCUMENTS = (
    *("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "glm", "glm4"),
    *("deepseek_v3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3"),
)
# families without positions: max_position_embeddings only says what they were trained with
UNLIMITED = ("bloom", "mamba", "mamba2", "rwkv")
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def check(block: dict | None) -> None:
    """Raise UserError for a model block that cannot be built: unknown family, unknown key, a key that is not the
    recipe's to say."""
    from pipeline.train import moe_aux_loss

    if not block:
        raise UserError(
            "model: the recipe has no model block; write for example model: {family: llama, hidden_size: 256,"
            " num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 688}"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if "family" not in block:
        near = difflib.get_close_matches("family", block, 1)
        raise UserError(
            f"model.{near[0]}: unknown key; did you mean 'family'?"
            if near
            else "model: the key family is missing; it is the model_type of a transformers causal LM, such as llama"
        )
    family = block["family"]
    if not isinstance(family, str) or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(str(family), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else "it is the model_type of a transformers causal LM, such as llama, qwen3, mistral, gemma2, gpt2"
        )
        raise UserError(f"model.family: {shown(family)} is unknown; {hint}")
    bare = _config(family, {})
    known = {*bare.to_dict(), *bare.attribute_map, *OWN, *UNLISTED.get(family, ())}
    length = bare.attribute_map.get("max_position_embeddings")  # GPT's n_positions, RWKV's context_length
    problems = Problems()
    for key, value in block.items():
        if key in TAKEN or key == length:
            problems.add(f"model.{key}: leave it out: {TAKEN.get(key, TAKEN['max_position_embeddings'])}")
        elif key not in known:
            near = difflib.get_close_matches(key, known - set(TAKEN), 1)
            problems.add(
                f"model.{key}: {family} has no such key; "
                + (
                    f"did you mean {near[0]}?"
                    if near
                    else f"it has {', '.join(sorted(k for k in known if not k.startswith('_')))}"
                )
            )
        elif SIZES.fullmatch(key) and value is not None and type(value) is not int:
            problems.add(f"model.{key} is {shown(value)}, expected a whole number")
        elif type(value) is int and SIZES.fullmatch(key) and not 0 < value <= LARGEST_SIZE:
            problems.add(f"model.{key} is {value}, expected 1 to {LARGEST_SIZE:,}")
        elif type(value) is int and "layer" in key and value > MOST_LAYERS:
            problems.add(f"model.{key} is {value}, expected at most {MOST_LAYERS:,}")
    problems.refuse()
    config = _config(family, _keys(block))
    moe_aux_loss.coefficient(config)
    mup.check(block, config)
    heads, width = getattr(config, "num_attention_heads", None) or 1, config.hidden_size  # mamba and rwkv have none
    if "head_dim" not in block and width % heads:
        raise UserError(f"model: hidden_size {width} is not divisible by num_attention_heads {heads}")
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise UserError(f"model: num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")


def check_documents(family: str) -> None:
    """Raise UserError for a family whose tokens would see other documents of a row in spite of `document_mask`."""
    if family not in DOCUMENTS:
        raise UserError(
            f"document_mask: {family} is not among the families whose attention was seen to stay within a document"
            f" ({', '.join(DOCUMENTS)}); leave it out"
        )


def shape(block: dict):
    """The transformers configuration of a checked model block, without what the tokenizer and the stage decide."""
    return _config(block["family"], _keys(block))


def configure(block: dict, tokenizer, sequence_length: int):
    """The transformers configuration of a checked model block, with the tokenizer's vocabulary and special ids."""
    check(block)
    multiple = block.get("pad_vocab_to", 1)
    vocabulary = -(-len(tokenizer) // multiple) * multiple
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    special = {
        "vocab_size": vocabulary,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # transformers keeps the embedding of the padding token at zero, which text must not suffer
        "pad_token_id": None if tokenizer.pad_token_id in used else tokenizer.pad_token_id,
    }
    return _config(
        block["family"],
        {**_keys(block), **mup.kept(block), **special, "max_position_embeddings": sequence_length, "use_cache": True},
    )


def new(block: dict, tokenizer, sequence_length: int, seed: int, materialise: bool = True):
    """A causal LM of a model block, fp32, on the CPU. Without `materialise` its parameters are on the meta device,
    for `initialise` in parts."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models import experts

    config = configure(block, tokenizer, sequence_length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    experts.install(model)
    # torch gives the embedding of this token no gradient. Padding has none anyway, for it is masked by position; a text
    # in which the same token is the end must be learned from.
    model.get_input_embeddings().padding_idx = None
    model.config.architectures = [type(model).__name__]
    model.generation_config.max_length = sequence_length
    if materialise:
        model.to_empty(device="cpu")
        model.tie_weights()
        initialise(model, seed)
    return model


def initialise(model, seed: int, global_name: Callable[[str], str] = str) -> None:
    """Fill a model, or a part of one, with transformers' own initial values for its family.

    Each module draws from a generator seeded by (seed, its name in the whole model), children first. A module all of
    whose parameters were filled before, such as an output layer tied to the embedding, is left alone. What a family
    leaves to its constructors is found by the NaNs that stand in every parameter before (GPT-1's Conv1D; transformers
    gives it normal weights and no bias), and none may stay. `init` and `mup` come last.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    filled: set[int] = set()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
        for name, part in _children_first(model, ""):
            own = list(part.parameters(recurse=False))
            if own and all(id(parameter) in filled for parameter in own):
                continue
            torch.manual_seed(derive(seed, "initial", global_name(name)))
            model._init_weights(part)
            if isinstance(part, Conv1D) and part.weight.isnan().any():
                part.weight.normal_(std=model.config.initializer_range)
                part.bias.zero_()
            filled.update(id(parameter) for parameter in own)
        mup.initial(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    assert not empty, f"{model.config.model_type}: no initial values for {', '.join(empty[:3])}"


def positions(config) -> int | None:
    """Most tokens of a row that a model of this configuration has positions for; None for any number."""
    if config.model_type in UNLIMITED:
        return None
    return getattr(config, "max_position_embeddings", None)


def load(folder: Path | str, head: Literal["causal", "reward", "judge"] = "causal", seed: int = 0, config=None):
    """The model in a folder, fp32, on the CPU. head="reward" and head="judge" give one score a sequence. A score layer
    that the folder lacks is drawn from `seed` for "reward", a model to be trained, and refused for "judge", one whose
    scores count.

    `config` replaces the folder's own (see `changed`).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from pipeline.models import experts

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: holds no model (no config.json); expected a folder in the Hugging Face layout")
    kind = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    made = AutoConfig.from_pretrained(folder, local_files_only=True)
    if head == "judge" and made.num_labels != 1:
        if any("SequenceClassification" in name for name in made.architectures or []):
            raise UserError(
                f"{folder}: gives {made.num_labels} scores a sequence, expected a reward model, which gives one"
            )
    if config is not None:
        made = config
    elif head != "causal":
        made = AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=1)
    # Stages choose how a model computes. A folder that names a kernel may be read where there is none.
    made._attn_implementation = made._experts_implementation = None
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(derive(seed, "initial", "score"))
        model, info = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, config=made
        )
    expected = {"score.weight"} if head == "reward" else set()
    lacking = set(info["missing_keys"]) - expected
    if head == "judge" and "score.weight" in lacking:
        raise UserError(f"{folder}: is no reward model, it has no score layer; give the output of a stage reward")
    if lacking:
        raise UserError(
            f"{folder}: the weights of {', '.join(sorted(lacking)[:3])} are missing for a {type(model).__name__};"
            " publish the model again, or name another folder"
        )
    experts.install(model)
    # torch gives the embedding of this token no gradient. Padding has none anyway, for it is masked by position; a text
    # in which the same token is the end must be learned from.
    model.get_input_embeddings().padding_idx = None
    model.config.architectures = [type(model).__name__]
    return model


def changed(folder: Path | str, changes: dict, sequence_length: int):
    """The configuration of a model folder for training to go on with: `changes` made, and positions for rows of
    `sequence_length` tokens.

    Raises UserError for a change of a parameter's shape, and for rows that the model has no positions for unless
    `changes` say how they are scaled.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: holds no model (no config.json); expected a folder in the Hugging Face layout")
    before = AutoConfig.from_pretrained(folder, local_files_only=True)
    length = before.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    most, rotary = getattr(before, length, None), hasattr(before, "rope_parameters")
    longer = bool(most) and sequence_length > most
    if longer and not (rotary and "rope_parameters" in changes) and before.model_type not in UNLIMITED:
        how = (
            "; or say how positions are scaled, such as model_changes: {rope_parameters: {rope_type: yarn, factor: %g,"
            " ...}}" % (sequence_length / most)
            if rotary
            else ", since its positions are learned"
        )
        raise UserError(
            f"sequence_length: {sequence_length} is more than the {most} positions of the model in {folder}; use {most}"
            f" or fewer{how}"
        )
    known = {*before.to_dict(), *UNLISTED.get(before.model_type, ())}
    for key in changes:
        if key in TAKEN or key == length or key not in known:
            near = difflib.get_close_matches(key, known - set(TAKEN), 1)
            raise UserError(
                f"model_changes.{key}: "
                + (
                    f"leave it out: {TAKEN[key]}"
                    if key in TAKEN
                    else f"{before.model_type} has no such key" + (f"; did you mean {near[0]}?" if near else "")
                )
            )
    kept = {key: value for key, value in before.to_dict().items() if key != "model_type"}
    after = _config(before.model_type, {**kept, **changes, **({length: sequence_length} if longer else {})})
    after.architectures = before.architectures
    with torch.device("meta"):
        shapes = [
            {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
            for config in (before, after)
        ]
    if other := sorted(
        name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
    ):
        raise UserError(
            f"model_changes: {', '.join(changes)} would change the shape of {other[0]}; a model goes on with the"
            " parameters it has"
        )
    return after


def publish(state_dict: dict, model_config, tokenizer_folder: Path, folder: Path, parent: Path | None = None) -> None:
    """Write weights, configuration, generation configuration and tokenizer files in the Hugging Face layout. Equal
    input, equal bytes.

    `model_config.architectures` names the class. `parent` is the folder that training started from, by default that of
    the tokenizer: its generation_config.json is kept, with the end of a chat turn added to the ends (`stop_ids`).
    """
    import torch
    import transformers

    from pipeline.data.tokens.store import load_tokenizer

    kind = getattr(transformers, model_config.architectures[0])
    with torch.device("meta"):
        skeleton = kind._from_config(model_config)
    if folder.exists():  # left half-written by a killed run
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    tied = set(getattr(skeleton, "_tied_weights_keys", None) or ()) if model_config.tie_word_embeddings else set()
    generates = skeleton.can_generate()
    if generates:  # what transformers derives from config.json may be more than it agrees to save
        skeleton.generation_config = transformers.GenerationConfig()
    with quiet():
        skeleton.save_pretrained(
            folder,
            state_dict={key: value.contiguous() for key, value in state_dict.items() if key not in tied},
            max_shard_size="5GB",
        )
    add_older_keys(folder)
    if generates:
        settings = generation_settings(Path(parent or tokenizer_folder), load_tokenizer(tokenizer_folder))
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / GENERATION).write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_folder) / name).is_file():
            shutil.copyfile(Path(tokenizer_folder) / name, folder / name)


def generation_settings(folder: Path, tokenizer) -> dict:
    """generation_config.json of a model that was trained from the one in `folder`: its own settings, unchanged, and
    what they lack of ends (`stop_ids`), beginning and padding."""
    import transformers

    before = _read_json(folder / GENERATION)
    # "_from_model_config" tells transformers to make the settings again from config.json, which has other ends
    kept = {key: value for key, value in before.items() if key != "_from_model_config"}
    ends = stop_ids(folder, tokenizer)
    if ends and ends != _listed(kept.get("eos_token_id")):
        kept["eos_token_id"] = ends
    own = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for key, value in own.items():
        if value is not None and kept.get(key) is None:
            kept[key] = value
    kept.setdefault("transformers_version", transformers.__version__)
    return dict(sorted(kept.items()))


def stop_ids(folder: Path, tokenizer) -> list[int]:
    """Ids at which generation with the model in `folder` ends, each once: those of its generation_config.json, or else
    of its config.json, or else the tokenizer's end of text; and the end of turn that the chat template teaches. May
    be empty."""
    from pipeline.data.chat.turns import end_of_turn

    named = [_read_json(folder / name).get("eos_token_id") for name in (GENERATION, "config.json")]
    first = next((value for value in [*named, tokenizer.eos_token_id] if value is not None), None)
    turn = end_of_turn(tokenizer)
    return list(dict.fromkeys([*_listed(first), *([] if turn is None else [turn])]))


def _listed(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict:
    """A JSON object, or an empty one where there is no file. Raises UserError for a damaged file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); copy the model again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds {type(found).__name__}, expected a JSON object; copy the model again")
    return found


def describe(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def _config(family: str, keys: dict):
    from transformers import AutoConfig

    try:
        if keys:  # YAML's 0 is an integer, which transformers refuses where it wants a number with a point
            usual = AutoConfig.for_model(family)
            keys = {
                key: float(value) if type(value) is int and isinstance(getattr(usual, key, None), float) else value
                for key, value in keys.items()
            }
        return AutoConfig.for_model(family, **keys)
    except Exception as error:  # transformers checks some values, and divides by others or looks them up
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        if not isinstance(error, (ValueError, TypeError)):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"model: {family} cannot be built from these values: {reason[:300]}") from None


def _keys(block: dict) -> dict:
    return {key: value for key, value in block.items() if key not in OWN}


def _children_first(module, name: str):
    """(global name, module) with every module after its children: some families initialise a child again from its
    parent (GPT-2's c_proj)."""
    for child, part in module.named_children():
        yield from _children_first(part, f"{name}.{child}" if name else child)
    yield name, module


@contextlib.contextmanager
def quiet():
    """transformers reports each load and save with progress bars and tables; a stage says what matters itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
