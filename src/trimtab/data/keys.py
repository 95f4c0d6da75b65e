"""The keys to which common formats of rows give a meaning, in one table, and what happens to a row that has one.

The formats are OpenAI's chat fine-tuning, ShareGPT and axolotl, LLaMA-Factory and Alpaca, TRL, ms-swift, torchtune and NeMo. A key of the
table is honoured exactly, or its row is dropped with the reason. A neutral value (null, an empty list, a weight of 1) is treated as if the
key were absent. Keys that are neither in this table nor columns of a form are unused, and `sources` reports them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class Repeated(tuple[Any, ...]):
    """The value of a column whose name occurs several times in the header: the cells of all of them."""


@dataclass(frozen=True)
class Key:
    """why: the reason with which a row that has the key is dropped. neutral(value): whether this value changes nothing."""

    why: str
    neutral: Callable[[Any], bool]


def is_blank(value: Any) -> bool:
    """Whether content is absent: null, NaN or blank text. The texts `[]` and `null` are content."""
    return not value.strip() if isinstance(value, str) else value is None or bool(value != value)


def is_empty(value: Any) -> bool:
    """Whether the value of a key (not of content) is absent. Null counts in all its spellings: NaN (pandas), blank text, lists and objects
    of nulls (Arrow's rows have every key that any row has), and an empty list or object written as text (a cell of a CSV)."""
    if isinstance(value, str):
        return value.strip() in ("", "null", "[]", "{}")
    if isinstance(value, dict | Repeated):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    if isinstance(value, list | tuple):
        return all(item is None for item in value)
    return value is None or bool(value != value)


def flag(value: Any) -> bool | None:
    """A mark as true or false, as a boolean, a number or text; None if it is neither 0 nor 1."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return bool(number) if number in (0.0, 1.0) else None


def wanted(label: Any) -> bool | None:
    """What KTO's `label` says of an answer: True or False; None if it is no mark of KTO."""
    if isinstance(label, str) and label.strip().lower() in ("desirable", "undesirable"):
        return label.strip().lower() == "desirable"
    return False if str(label).strip() in ("-1", "-1.0") else flag(label)


def _may_be(*values: Any) -> Callable[[Any], bool]:
    """Neutral: null, or one of these; True and False in any spelling."""
    flags = [v for v in values if isinstance(v, bool)]
    return lambda v: is_empty(v) or flag(v) in flags or (isinstance(v, str) and v in values)


_TOOLS = "it is not rendered there: tools stand at the row, calls in turns of the assistant, results in turns of the tool"
_MEDIA = "images, video and sound are not read"
_REASONING = "reasoning is rendered where it is text beside the content of a turn of the assistant"
_PAIR = "a pair of a better and a worse answer is not something to imitate; map the one to learn, such as `columns: {completion: chosen}`"
_TEMPLATE = "only settings that the chat template reads are passed on, and only to conversations"
_WEIGHT = "rows are not weighted one by one; give a source a weight instead"

_NOT_TRAINED = "the row is marked as not to be trained on"
_TOKENS = "token ids and their masks are not read, and neither are labels of steps; a class is mapped, such as `columns: {label: labels}`"
_BEGUN = "an answer that is begun is not told from a whole one"
_SEVERAL = "several answers to one prompt; give each a row of its own as completion"

PAIRS = (
    *("chosen", "rejected", "preferred_output", "non_preferred_output"),
    *("chosen_response", "rejected_response", "rejected_messages", "rejected_images"),
)

WEIGHTS = ("weight", "loss_weight", "sample_weight")

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "objects")

ROW_KEYS: Mapping[str, Key] = {
    **dict.fromkeys(("tools", "functions"), Key(_TOOLS, is_empty)),
    **dict.fromkeys(("tool_calls", "tool_results"), Key(_TOOLS, is_empty)),
    "tool_choice": Key(_TOOLS, _may_be("auto", "none")),
    "function_call": Key(_TOOLS, _may_be("auto", "none")),
    "parallel_tool_calls": Key(_TOOLS, _may_be(True, False)),
    **dict.fromkeys(MEDIA, Key(_MEDIA, is_empty)),
    "documents": Key("documents beside the conversation are not rendered", is_empty),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), Key(_REASONING, is_empty)),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking", "reasoning_effort"), Key(_TEMPLATE, is_empty)),
    **dict.fromkeys(PAIRS, Key(_PAIR, is_empty)),
    **dict.fromkeys(WEIGHTS, Key(_WEIGHT, _may_be(True))),
    **dict.fromkeys(("train", "training", "trainable", "loss"), Key(_NOT_TRAINED, _may_be(True))),
    **dict.fromkeys(("mask", "masked"), Key(_NOT_TRAINED, _may_be(False, "User", "user", "human"))),  # NeMo names the role that is masked
    **dict.fromkeys(("input_ids", "attention_mask", "position_ids", "labels"), Key(_TOKENS, is_empty)),
    **dict.fromkeys(("completion_mask", "assistant_masks", "loss_mask"), Key(_TOKENS, is_empty)),
    "completions": Key(_SEVERAL, is_empty),
    "train_on_inputs": Key("what stands before an answer is never supervised", _may_be(False)),
    "kto_tag": Key("the answer is marked as unwanted, and imitation would learn it", _may_be(True)),
}
"""Of a row. Beside these, `forms` and `rows` honour the columns of the forms, `system` and `history`, `TOOL_KEYS` and `SETTING_KEYS` of a
conversation, and read a `label` as the mark of KTO where it is one (`wanted`)."""

TOOL_KEYS = ("tools", "functions")
SETTING_KEYS = ("chat_template_kwargs", "enable_thinking", "reasoning_effort")
"""Of a row that is a conversation, or a prompt with its answer: these are passed to the chat template."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Of a turn of the assistant: its reasoning, whatever the format calls it."""

MARKS = (*WEIGHTS, "train", "training", "trainable", "train_on_turn", "loss", "loss_mask", "loss_scale")
"""Of a turn: 0 or false says that it is not to be learnt, which is honoured."""
MASKS = ("mask", "masked")
"""Of a turn, the other way round: 1 or true says that it is not to be learnt."""

TURN_KEYS: Mapping[str, Key] = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools", "functions"), Key(_TOOLS, is_empty)),
    **dict.fromkeys(("tool_plan", "tool_results", "tool_responses"), Key(_TOOLS, is_empty)),
    "ipython": Key(_TOOLS, _may_be(False)),
    **dict.fromkeys(("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio"), Key(_MEDIA, is_empty)),
    **dict.fromkeys(("file", "files"), Key("files are not read", is_empty)),
    **dict.fromkeys(("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks"), Key(_REASONING, is_empty)),
    "name": Key("names of participants are not rendered", is_empty),
    "refusal": Key("a refusal beside the content is not rendered", is_empty),
    "annotations": Key("annotations are not rendered", is_empty),
    **dict.fromkeys(("train_detail", "training_detail"), Key("parts of a turn are not marked one by one", is_empty)),
    "channel": Key("channels are not rendered", _may_be("final")),
    "recipient": Key(_TOOLS, _may_be("all")),
    **dict.fromkeys(("prefix", "partial"), Key(_BEGUN, _may_be(False))),
    **dict.fromkeys(("end_turn", "eot"), Key(_BEGUN, _may_be(True))),
}
"""Of a turn, beside role and content (from and value), `MARKS` and `MASKS`. Where a role has a key that is honoured, `turns` says so."""
