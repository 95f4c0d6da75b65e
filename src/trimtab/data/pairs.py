"""Records with a better and a worse answer, or with an answer and a mark, as records of the forms that `rows` reads, an answer each.

| columns                                                     | prompt                                        | written by              |
|-------------------------------------------------------------|-----------------------------------------------|-------------------------|
| prompt, chosen, rejected                                    | prompt, text or messages                      | TRL                     |
| chosen, rejected                                            | what both begin with, messages or text        | TRL, Anthropic's hh-rlhf |
| input: {messages, …}, preferred_output, non_preferred_output | input.messages                               | OpenAI                  |
| messages or conversations, chosen, rejected                 | the messages                                  | LLaMA-Factory           |
| instruction, optional input, chosen, rejected               | as an instruction's                           | LLaMA-Factory           |
| any form of an answer, with label or kto_tag                | that form's                                   | TRL, LLaMA-Factory      |

An answer is text, a message, or a list of messages. Whatever else a record holds (system, history, tools, …) goes with each answer, so that
it is read, or its row dropped, as in rows of one answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from trimtab.bases.template import BadRow
from trimtab.data.forms import form_of
from trimtab.data.keys import is_blank, is_empty, wanted
from trimtab.data.turns import ROLES, kind_of, talk_in

Record: TypeAlias = Mapping[str, Any]

DESIRABLE, UNDESIRABLE, REJECTED = "desirable", "undesirable", "rejected"
SIDES = ("chosen", "rejected")
OPENAI = ("preferred_output", "non_preferred_output")
ANSWERS = ("completion", "output")
PAIR_COLUMNS = ("chosen", "rejected", "margin", "label", "kto_tag", "completions", "labels", *OPENAI)
"""What objectives read beside the columns of the forms: `columns` may name these too."""
PAIRED = "prompt + chosen + rejected | chosen + rejected | input + preferred_output + non_preferred_output"
UNPAIRED = "prompt + completion + label | messages + label | instruction + output + kto_tag"


def pair(record: Record) -> tuple[Record, Record]:
    """The better and the worse answer. BadRow if there are not two, they are equal, or they answer different prompts."""
    rest, sides = _sides(record)
    chosen, rejected = (rest.pop(side) for side in sides)
    for name in ANSWERS:
        if not is_empty(rest.get(name)):  # what neither answer is; the name is one that reports call unused
            rest[f"{name} beside {' and '.join(sides)}"] = rest.pop(name)
    if is_empty(rest.get("instruction")):
        made = _prompted(rest, chosen, rejected)
    else:
        made = {**rest, "output": chosen}, {**rest, "output": rejected}
    answers = [part.get("completion", part.get("output")) for part in made]
    if answers[0] == answers[1]:
        raise BadRow(f"equal pair: {' and '.join(sides)} are the same")
    if (form := form_of(made[0], {})) not in ("prompt", "instruction"):  # both answers would be read from there
        raise BadRow(f"no pair: {form} says something else than what chosen and rejected answer")
    return made


def marked(record: Record) -> dict[str, Record]:
    """Answers under "desirable" or "undesirable": of a pair one each, else the one that a record has. BadRow where nothing says which."""
    if any(not _is_missing(record.get(name)) for name in (*SIDES, *OPENAI)):
        return dict(zip((DESIRABLE, UNDESIRABLE), pair(record), strict=True))
    rest = dict(record)
    marks = {name: rest.pop(name) for name in ("label", "kto_tag") if name in rest}
    said = {name: wanted(value) for name, value in marks.items() if not is_empty(value)}
    if None in said.values():
        name = next(n for n, mark in said.items() if mark is None)
        raise BadRow(f"{name}: {marks[name]!r} does not say whether the answer is wanted: true or false")
    if len(set(said.values())) != 1:
        problem = "label and kto_tag differ" if said else f"no label: nothing says whether the answer is wanted; understood: {UNPAIRED}"
        raise BadRow(problem)
    return {DESIRABLE if True in said.values() else UNDESIRABLE: _last_answer(rest)}


def _sides(record: Record) -> tuple[dict[str, Any], tuple[str, str]]:
    """(the record with both answers as text or lists of messages, their names); OpenAI's input is spread out."""
    found = dict(record)
    sides = OPENAI if any(not _is_missing(found.get(name)) for name in OPENAI) else SIDES
    missing = [name for name in sides if _is_missing(found.get(name))]
    if missing:
        what = "empty" if all(name in found for name in missing) else "missing"
        raise BadRow(f"no pair: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} {what}; understood: {PAIRED}")
    if sides == OPENAI:
        asked = found.pop("input", None)
        if not isinstance(asked, dict) or "messages" not in asked:
            raise BadRow(f"no pair: input is {kind_of(asked)}, not an object with messages")
        found |= {k: v for k, v in asked.items() if k != "messages"} | {"prompt": asked["messages"]}
    for name in sides:
        said = talk_in(found[name])
        found[name] = [said] if isinstance(said, dict) else said
    return found, sides


def _is_missing(answer: Any) -> bool:
    """The texts `[]` and `null` are answers."""
    return is_blank(answer) if isinstance(answer, str) else is_empty(answer)


def _prompted(rest: dict[str, Any], chosen: Any, rejected: Any) -> tuple[Record, Record]:
    """Both answers with the prompt that stands beside them, or that both begin with."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(f"no pair: one answer is {kind_of(chosen)}, the other one is {kind_of(rejected)}")
    if not isinstance(chosen, str) and not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise BadRow(f"no pair: an answer is {kind_of(chosen)}, neither text nor messages")
    for side in (chosen, rejected):
        if isinstance(side, list) and (bad := next((turn for turn in side if not isinstance(turn, dict)), side)) is not side:
            raise BadRow(f"no pair: an answer is a list that holds {kind_of(bad)}; messages are objects with role and content")
    if isinstance(chosen, list) and _is_whole(chosen) and _is_whole(rejected):
        return _from_whole(rest, chosen, rejected)
    beside = {name: rest.pop(name) for name in ("messages", "conversations", "prompt") if not is_empty(rest.get(name))}
    if len(beside) > 1:
        raise BadRow(f"no pair: {' and '.join(beside)}: which of them is the prompt?")
    if not beside:
        return _from_beginnings(rest, chosen, rejected)
    prompt = talk_in(next(iter(beside.values())))
    if isinstance(prompt, list) and isinstance(chosen, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    elif isinstance(prompt, str) and isinstance(chosen, list):
        prompt = [{"role": "user", "content": prompt}]
    return {**rest, "prompt": prompt, "completion": chosen}, {**rest, "prompt": prompt, "completion": rejected}


def _role(turn: Any) -> str | None:
    return ROLES.get(str(turn.get("role") or turn.get("from"))) if isinstance(turn, dict) else None


def _is_whole(answer: list[Any]) -> bool:
    """Whether an answer holds its prompt too: it begins with another role than the assistant's."""
    return bool(answer) and _role(answer[0]) != "assistant"


def _from_whole(rest: dict[str, Any], chosen: list[Any], rejected: list[Any]) -> tuple[Record, Record]:
    """Conversations that begin alike. What else says the prompt must say the same, and goes."""
    same = _begin_alike(chosen, rejected)
    prompt, sides = chosen[:same], (chosen[same:], rejected[same:])
    if not all(sides):
        raise BadRow("equal pair: chosen and rejected are the same" if chosen == rejected else "no pair: one answer is a part of the other")
    if any(_role(side[0]) != "assistant" for side in sides):
        raise BadRow("no pair: chosen and rejected ask different things")
    said = rest.pop("prompt", None)
    if not is_empty(said) and talk_in(said) != prompt and said not in [turn.get("content", turn.get("value")) for turn in prompt]:
        raise BadRow("no pair: prompt says something else than what chosen and rejected begin with")
    for name in ("messages", "conversations"):
        if rest.get(name) in (chosen, prompt):
            del rest[name]
    return {**rest, "prompt": prompt, "completion": sides[0]}, {**rest, "prompt": prompt, "completion": sides[1]}


def _from_beginnings(rest: dict[str, Any], chosen: Any, rejected: Any) -> tuple[Record, Record]:
    """Texts that begin alike: the prompt is their common beginning, up to the last blank before they differ if that is the place (TRL)."""
    if isinstance(chosen, list):
        raise BadRow(f"no prompt: chosen and rejected are answers alone; understood: {PAIRED}")
    same = _begin_alike(chosen, rejected)
    same -= same > 0 and chosen[same - 1] == " "
    if not same:
        raise BadRow("no prompt: chosen and rejected begin with nothing in common")
    return {**rest, "prompt": chosen[:same], "completion": chosen[same:]}, {**rest, "prompt": chosen[:same], "completion": rejected[same:]}


def _begin_alike(a: Any, b: Any) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _last_answer(record: dict[str, Any]) -> Record:
    """A conversation whose mark speaks of its last answer; other forms have one answer."""
    for name in ("messages", "conversations"):
        turns = talk_in(record.get(name))
        if isinstance(turns, list) and len(turns) > 1 and _role(turns[-1]) == "assistant":
            rest = {k: v for k, v in record.items() if k not in ("messages", "conversations")}
            return rest | {"prompt": turns[:-1], "completion": turns[-1:]}
    return record
