"""What the fields of chat data mean, by name: which change what should be learned, and which are only metadata.

The rule: every field of a record, of a message and of a content part is used, known to say nothing about what is
learned, empty, a repetition of the conversation, or a reason to reject the record. A name that is in none of these
tables rejects it, too, because nobody can know what it means; the user says with `ignore` that it means nothing. To
give a field its meaning, read it in pipeline/data/chat/messages.py and take it out of MEANINGFUL.

Names are compared in snake case: `toolCalls` and `Tool-Calls` are `tool_calls`.
"""

import json
import re

from pipeline.data.sources.text_encoding import printable_name


class Rejected(Exception):
    """Why a record cannot be used, and what the user can do about it."""

    def __init__(self, reason: str, advice: str = ""):
        super().__init__(reason)
        self.advice = advice


# What a field is that changes what should be learned, or how, and that is not supported: the reason of its rejection.
MEANINGFUL = {
    "reasoning before an answer": (
        "reasoning_content reasoning thinking think thought thoughts reasoning_text reasoning_details analysis"
        " chain_of_thought cot rationale scratchpad"
    ),
    "tools": (
        "tools tool tool_calls tool_call tool_call_id tool_choice tool_results tool_responses functions function"
        " function_call function_calls is_error tool_schema tool_definitions available_tools api apis"
    ),
    "content that is not text": (
        "image images image_url image_urls picture pictures video videos audio audios media multimodal"
        " file_ids pixel_values bboxes objects"
    ),
    "which tokens carry loss": (
        "mask masks masked loss_mask loss_masks loss_scale train_detail training_detail train_on_input train_on_inputs"
        " mask_history label_mask assistant_masks completion_mask prompt_mask token_weights weights trainable_spans"
    ),
    "a judgement of how good it is": (
        "label labels score scores rating ratings reward rewards rank ranking quality preference preferred votes"
        " upvotes downvotes feedback toxic is_correct correct accepted verified valid process_reward step_labels"
    ),
    "what the answer depends on": (
        "context contexts passage passages document documents knowledge background hint hints evidence retrieved"
        " citations references demonstrations examples few_shot history system system_prompt chat_template_kwargs"
        " chat_template enable_thinking template name partial prefix prefill refusal"
    ),
    "another answer, or another part of the conversation": (
        "messages conversations conversation prompt completion instruction input output response responses question"
        " query answer answers target chosen rejected dialog dialogue turns_list"
    ),
}
# Words of a compound name that make it one of the above: `sample_weight`, `reward_score`, `tool_schema_json`.
MEANINGFUL_WORDS = set(
    "weight weights mask masks masked loss train training trainable reward rewards score scores rating ratings label"
    " labels reasoning thinking thought thoughts tool tools function functions image images img imgs picture pictures"
    " photo photos pixel pixels frame frames video videos audio audios wav speech media multimodal history system"
    " context documents passage hint screenshot screenshots figure figures chart charts diagram diagrams plot plots"
    " gif gifs jpg jpeg png svg webp attachment attachments clip clips mp3 mp4 movie voice sound music scan scans"
    " illustration drawing sketch ocr thumbnail bytes base64 b64 blob html pdf diff patch persona knowledge evidence"
    " background memory transcript caption".split()
)
# Last words of a compound name that make it something to read, whatever it begins with: `source_code`, `original_text`,
# `meta_instruction`.
CONTENT_WORDS = set(
    "text texts input inputs content contents body code document article abstract paragraph paragraphs sentence"
    " sentences table data prompt instruction instructions".split()
)

# Says nothing about what is to be learned: where a record comes from, what it is about, how long it is.
METADATA = set(
    "id ids uid uuid guid key idx index row no number hash sha sha1 sha256 md5 source sources origin provenance dataset"
    " datasets data_source subset split config domain domains site website lang langs language languages locale country"
    " state region script license licence copyright url urls uri link links href doi isbn author authors user_id"
    " username annotator annotators worker model models model_name engine generator provider version revision created"
    " updated timestamp timestamps time date datetime year month topic topics subtopic tag tags keyword keywords"
    " category categories subcategory subject subjects genre type types kind kinds task tasks ability skill skills"
    " field fields area level grade difficulty complexity turn turns num_turns length len size tokens chars words meta"
    " metadata info extra extra_info title titles filename file path place line views likes header hashed_ip"
    " avatar_url redacted openai_moderation detoxify_moderation moderation usage finish_reason stop_reason"
    " parallel_tool_calls"
    " cache_control annotator_notes gen_input_configs answer_from human_verified comment comments"
    " 编号 序号 来源 数据来源 出处 数据集 领域 类别 分类 类型 主题 话题 关键词 语言 语种 难度 难度等级 作者 标注员 模型"
    " 时间 日期 创建时间 更新时间 版本 许可证 链接 网址 备注 字数 长度 轮数".split()
)
METADATA_PATTERN = re.compile(
    r"_.*|(num|n)_.*"
    r"|.*_(id|ids|uid|uuid|idx|index|hash|date|time|timestamp|at|count|counts|len|length|lengths|lang|language|name"
    r"|license|category|type|types|tag|tags|topic|model|tokens|chars|words|ms)"
    r"|(prompt|question|response|answer|problem|instruction|conversation|annotation|sample)_(source|url)"
)
# A file or an address may be what the conversation is about, and `source_` may be in front of anything. These names are
# metadata only if all their words are: those of METADATA and these.
METADATA_WORDS = METADATA | set(
    "src original orig data json jsonl parquet by at page pages web homepage home base root parent repo repository git"
    " github gitlab arxiv paper post thread forum wiki wikipedia profile user account blog canonical download hf"
    " huggingface commit issue question release name names count text_id rev".split()
)
FILE_WORDS = {"file", "filename", "path", "url", "urls", "uri", "link", "links", "href"}
# A text that begins or ends with one of these has a file beside it in its place: <image>, <image_1>, <|image|>,
# <|image_pad|>.
_PLACE = r"<(?:image|video|audio)(?:_\d+)?>|<\|(?:image|video|audio)(?:_pad|_\d+)?\|>"
PLACEHOLDER = re.compile(rf"\s*({_PLACE})|(?s:.*)({_PLACE})\s*\Z")

# Flags that say whether a message, or a whole record, carries loss.
FLAGS = ("weight", "train", "loss", "training", "trainable", "loss_weight", "sample_weight")
# Those that are only true or false: `loss` is also what somebody has measured, `training` a count of steps.
SWITCHES = ("loss", "training")
# Reference answers say nothing about which of two answers is better.
REFERENCES = set(
    "completion output response responses answer answers solution solutions target reference references ground_truth"
    " test test_cases tests expected final_answer".split()
)
# In records from which only the prompt is read, these belong to answers that are not read.
ANSWERS = {"chosen", "rejected", "label", "kto_tag", "margin", "reward_model", *REFERENCES, *FLAGS}
JUDGEMENTS = set(MEANINGFUL["a judgement of how good it is"].split())
REASONING = set(MEANINGFUL["reasoning before an answer"].split())
# Texts of what was thought before an answer, by their names in messages and records.
REASONING_TEXTS = REASONING - {"reasoning_details", "analysis", "rationale", "scratchpad"}

# How a generation ended, where that means that its answer is incomplete.
ENDINGS = ("finish_reason", "stop_reason")
CUT_OFF = ("length", "max_tokens", "max_output_tokens", "content_filter", "incomplete")

_WHAT = {name: what for what, names in MEANINGFUL.items() for name in names.split()}


def snake(name: str) -> str:
    """A field's name in snake case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).replace("-", "_").replace(" ", "_").lower()


def empty(value, depth: int = 6) -> bool:
    """Whether a field says nothing: null, no text, no items, or items that all say nothing (as columns of parquet have
    them where another row has a value). `[]`, `{}` and `null` may also be spelled in a text, as tools often are."""
    if value is None:
        return True
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, (list, tuple, dict)) and depth:
        return all(empty(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return False


def unsupported(fields: dict, used: set[str], harmless: set[str] = frozenset()) -> list[tuple[str, str | None]]:
    """The fields that would be dropped although they change what should be learned, or may: (name, what it is), with
    what None for a name that nobody knows, and these last. Empty if all fields are in `used`, in `harmless`, empty, or
    metadata."""
    meaningful, unknown = [], []
    for name, value in fields.items():
        plain = snake(name)
        if name in used or plain in harmless or empty(value):
            continue
        if plain in ENDINGS and str(value).lower() in CUT_OFF:
            meaningful.append((printable_name(name), f"{value}: the answer was cut off"))
        elif plain in _WHAT:
            meaningful.append((printable_name(name), _WHAT[plain]))
        elif not is_metadata(plain):
            unknown.append((printable_name(name), None))
        elif mark := _loss_mark(value, harmless):
            meaningful.append((printable_name(name), f"its `{mark}` says which tokens carry loss"))
    return meaningful + unknown


def _loss_mark(value, harmless: set[str], depth: int = 3) -> str | None:
    """The field within metadata, which may be JSON text, that says that something carries no loss, or another one:
    `metadata: {weight: 0}`."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, dict) or not depth:
        return None
    for name, inner in value.items():
        plain = snake(name)
        is_one = str(inner).strip().lower() in ("true", "1", "1.0")
        is_mark = plain in FLAGS and not is_one or _WHAT.get(plain) == "which tokens carry loss"
        if is_mark and plain not in harmless and not empty(inner):
            return printable_name(name)
        if mark := _loss_mark(inner, harmless, depth - 1):
            return f"{printable_name(name)}.{mark}"
    return None


def file_fields(fields: dict) -> list[str]:
    """The fields that hold the name or the address of a file."""
    return [name for name, value in fields.items() if FILE_WORDS & set(_words(name)) and not empty(value)]


def _words(name: str) -> list[str]:
    return snake(name).replace("filename", "file_name").split("_")


def is_metadata(plain: str) -> bool:
    """Whether a field of this name, in snake case, says nothing about what is to be learned."""
    if plain in METADATA:
        return True
    words = plain.split("_")
    if MEANINGFUL_WORDS.intersection(words) or words[-1] in CONTENT_WORDS:
        return False
    if METADATA_PATTERN.fullmatch(plain) is not None:
        return True
    return all(word in METADATA_WORDS for word in words)
