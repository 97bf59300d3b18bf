"""Models in memory: new ones from a recipe's `model` block, and those of a folder.

Every model is a `transformers` model, fp32 and on the CPU; engines move it. What a stage publishes (publish.py) is
read by from_pretrained, vLLM, lm-eval and TRL.
"""

import contextlib
import copy
from pathlib import Path
from typing import Literal

from pipeline.core.errors import UserError
from pipeline.core.seeds import derive
from pipeline.models.model_block import full_config

SCORE = {"score.weight", "score.bias"}  # transformers' names of a classifier's head


def new(block: dict, tokenizer, sequence_length: int, seed: int, materialise: bool = True):
    """A causal LM of a model block. Without `materialise` its parameters are on the meta device, to be filled in parts
    by `initialise`."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.models.initial_values import initialise

    config = full_config(block, tokenizer, sequence_length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _prepare(model)
    model.generation_config.max_length = sequence_length
    if materialise:
        model.to_empty(device="cpu")
        model.tie_weights()
        initialise(model, seed)
    return model


Head = Literal["causal", "reward", "judge", "steps"]


def load(folder: Path | str, head: Head = "causal", seed: int = 0, config=None):
    """The model of a folder. `config` replaces the folder's own (see model_block.changed_config).

    head="reward" and head="judge" give one score per sequence. If the folder has no score layer, it is drawn from
    `seed` for "reward", a model that will be trained, and refused for "judge", whose scores are used. head="steps", of
    a model that will be trained, gives two scores per token, whose difference is the logit of "this step is right".
    """
    import torch

    from pipeline.models import lora

    if lora.is_adapter(folder):
        return _load_adapted(Path(folder), head, seed, config)
    model_class, config = _class_and_config(folder, head, config)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(derive(seed, "initial", "score"))
        model, info = model_class.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, config=config
        )
    missing = set(info["missing_keys"])
    if head in ("reward", "steps"):
        missing -= SCORE
    if head == "judge" and missing & SCORE:
        raise _no_judge(folder)
    if missing:
        raise UserError(
            f"{folder}: the weights of {', '.join(sorted(missing)[:3])} are missing for a {type(model).__name__};"
            " publish the model again, or name another folder"
        )
    _prepare(model)
    return model


def skeleton(folder: Path | str, head: Head = "causal", seed: int = 0, config=None):
    """(the model of a folder with its parameters on the meta device, what fills it part by part), so that no process
    needs to hold all of it; arguments and values are those of `load`. The second is None, and the model complete, for
    the folders that can only be read as a whole: adapters, which are merged into their base, models whose files have
    both of two weights that the configuration ties, and those with parameters beside the parts that are read."""
    import torch
    from transformers import GenerationConfig

    from pipeline.models import lora
    from pipeline.models.folder_weights import FolderWeights
    from pipeline.models.model_parts import Parts

    folder = Path(folder)
    if lora.is_adapter(folder):
        return load(folder, head, seed, config), None
    model_class, chosen = _class_and_config(folder, head, config)
    with torch.device("meta"):
        model = model_class.from_config(copy.deepcopy(chosen), dtype=torch.float32)
    optional = set() if head == "causal" else SCORE
    weights = FolderWeights(folder, model, derive(seed, "initial", "score"), optional)
    if head == "judge" and "score.weight" not in weights.sources:
        raise _no_judge(folder)
    if weights.has_two_tables() or not Parts(model).cover():
        return load(folder, head, seed, config), None
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    _prepare(model)
    return model.eval(), weights


def _class_and_config(folder: Path | str, head: str, config):
    """(transformers' class, configuration) of the model in a folder. config: instead of the folder's. Raises UserError
    for a folder without a model, or with one whose head is another."""
    import transformers
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: contains no model (no config.json); expected a folder in the Hugging Face layout")
    if head == "judge":
        _check_one_score(folder, AutoConfig.from_pretrained(folder, local_files_only=True))
    if config is None:
        config = _config_of(folder, head)
    # Stages choose how a model computes. A folder may name a kernel that this machine does not have.
    config._attn_implementation = config._experts_implementation = None
    return getattr(transformers, AUTO_CLASSES[head]), config


def _no_judge(folder: Path | str) -> UserError:
    return UserError(
        f"{folder}: is not a reward model: it has no score layer; give the output of a stage of kind reward"
    )


def _load_adapted(folder: Path, head: str, seed: int, config):
    """The model of a folder that contains an adapter, merged into its base."""
    from pipeline.models import lora

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: is an adapter without config.json; copy config.json, generation_config.json and the tokenizer's"
            " files of its base model into it, or merge it with peft"
        )
    if config is None:
        config = _config_of(folder, head)
    has_score = lora.trains_completely(folder, "score")
    base_head = "reward" if head == "judge" and has_score else head
    model = load(lora.base_of(folder), base_head, seed, config)
    lora.load(model, folder)
    lora.merge(model)
    return model


AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
    "judge": "AutoModelForSequenceClassification",
    "steps": "AutoModelForTokenClassification",
}


def _config_of(folder: Path | str, head: Head):
    """The configuration of a folder, for a model with this head."""
    from transformers import AutoConfig

    if head == "causal":
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    if head != "steps":
        return AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=1)
    labels = {0: "wrong", 1: "right"}
    label2id = {label: index for index, label in labels.items()}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, id2label=labels, label2id=label2id)
    config.classifier_dropout = 0.0  # by default transformers drops a tenth of what this head reads, and of no other
    check_scores_tokens(config)
    return config


def head_of(model) -> Head:
    """The head that a model in memory has."""
    name = type(model).__name__
    if "TokenClassification" in name:
        return "steps"
    return "reward" if "SequenceClassification" in name else "causal"


def check_scores_tokens(config) -> None:
    """Raise UserError for a family without a model that scores tokens with a layer called `score`."""
    from transformers.modeling_layers import GenericForTokenClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    model_class = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), None)
    if model_class is None or not issubclass(model_class, GenericForTokenClassification):
        raise UserError(
            f"a process reward model cannot be made of the family {config.model_type}: transformers has no class for it"
            " that scores tokens; start from another model, such as llama, qwen2, qwen3 or mistral"
        )


def _check_one_score(folder: Path | str, config) -> None:
    if any("TokenClassification" in name for name in config.architectures or []):
        raise UserError(
            f"{folder}: scores tokens, as a process reward model does, and has no score for a whole answer; give the"
            " output of a stage of kind reward"
        )
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise UserError(
            f"{folder}: gives {config.num_labels} scores per sequence, expected a reward model, which gives one"
        )


def _prepare(model) -> None:
    """What holds for every model here, new or loaded."""
    from pipeline.models import experts

    experts.install(model)
    # torch gives the embedding of this token no gradient. Padding has none anyway, because it is masked by position,
    # and where a text uses the same token as its end, it must be learned.
    model.get_input_embeddings().padding_idx = None
    model.config.architectures = [type(model).__name__]


@contextlib.contextmanager
def quiet():
    """Without the progress bars and tables that transformers prints at each load and save."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
