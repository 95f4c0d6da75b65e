"""Law 13: no content is lost. A row is trained with every message's text before it and exactly its answers supervised, or dropped.

Compared with transformers' own `apply_chat_template`, for every style of template and every kind of conversation: what stands before an
answer is what a server would feed the model, and the answer follows with its end.
"""

from __future__ import annotations

import json

import pytest

from tests.data.templates import STYLES, shaped
from trimtab.bases.template import encode_prompt
from trimtab.data import Dropped, Example, Row, encode_row, encode_rows, prompt_and_reference
from trimtab.errors import DataError


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


CONVERSATIONS = {
    "plain": turns(("user", "What is a?"), ("assistant", "It is b.")),
    "blanks": turns(("user", "  What\n\n is a? "), ("assistant", "\n It is\tb.  ")),
    "short": turns(("user", "a"), ("assistant", "s")),
    "system": turns(("system", "Be brief."), ("user", "a?"), ("assistant", "Yes.")),
    "developer": turns(("developer", "Answer in French."), ("user", "a?"), ("assistant", "Oui.")),
    "system and developer": turns(("system", "Be brief."), ("developer", "In French."), ("user", "a?"), ("assistant", "Oui.")),
    "late system": turns(("user", "a?"), ("assistant", "Yes."), ("system", "In German now."), ("user", "b?"), ("assistant", "Ja.")),
    "two turns": turns(("user", "first?"), ("assistant", "One."), ("user", "second?"), ("assistant", "Two.")),
    "two turns, system": turns(("system", "Count."), ("user", "1?"), ("assistant", "One."), ("user", "2?"), ("assistant", "Two.")),
    "the same answer twice": turns(("user", "1?"), ("assistant", "Yes."), ("user", "2?"), ("assistant", "Yes.")),
    "tool": turns(("user", "status of 7?"), ("tool", 'order 7: "shipped"\n'), ("assistant", "It is shipped.")),
    "a tool that says little": turns(("user", "status?"), ("tool", "s"), ("assistant", "yes, status")),
    "unknown role": turns(("user", "a?"), ("critic", "too long"), ("assistant", "b")),
    "reasoning": turns(("user", "6 * 7?"), ("assistant", "<think>\nsix times seven\n</think>\n\n42")),
    "reasoning, tight": turns(("user", "6 * 7?"), ("assistant", "<think>six times seven</think>42")),
    "reasoning before": turns(
        ("user", "6 * 7?"), ("assistant", "<think>\nsix times seven\n</think>\n\n42"), ("user", "and 8?"), ("assistant", "48")
    ),
    "reasoning beside": [
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": "42", "reasoning_content": "six times seven is 42"},
    ],
    "assistant turns in a row": turns(("user", "a?"), ("assistant", "One."), ("assistant", "Two.")),
    "starts with an answer": turns(("assistant", "Hello."), ("user", "a?"), ("assistant", "b.")),
}
# How many of them are trained, with all turns and with the last alone: so that the law is not kept by dropping everything.
TRAINED = {
    "chatml": (17, 18),
    "llama-3": (17, 18),
    "mistral-first": (8, 8),
    "mistral-later": (16, 18),
    "gemma": (13, 14),
    "parts-only": (17, 18),
    "parts-or-text": (17, 18),
    "three-roles": (14, 15),
    "no-system": (9, 10),
    "r1": (18, 19),
    "nemotron": (18, 19),
    "no-thinking": (17, 18),
    "qwen-3": (17, 18),
    "harmony": (14, 15),
    "no-end": (17, 18),
    "always-asks": (17, 18),
    "footer": (17, 18),
    "headless": (17, 18),
    "quoting": (17, 18),
    "parts-user": (17, 18),
}
# Styles that write no control token behind an answer: the row's last one gets the end token.
ENDLESS = {"no-end", "quoting"}


def as_served(messages, tokenizer, style):
    """transformers' own rendering of a prompt. A role that it has no turn for is the caller's to rename."""
    return tokenizer.apply_chat_template(shaped(messages, style), tokenize=False, add_generation_prompt=True)


def has_all(messages, text):
    """Each content in a place of its own, white space around it apart; reasoning of a context's assistant turn may be gone."""
    for m in sorted(messages, key=lambda m: -len(m["content"])):
        content = m["content"].strip()
        forms = [content, json.dumps(m["content"])[1:-1], json.dumps(content)[1:-1]]
        forms += [content.split("</think>")[-1].strip()] if m["role"] == "assistant" else []
        found = next((f for f in forms if f in text), None)
        if found is None:
            return False
        text = text.replace(found, "\0", 1)
    return True


def spans(example, end):
    """The places of each supervised run, cut behind every end token: two answers may follow one another directly."""
    found, new = [], True
    for i in range(len(example.ids)):
        if example.supervised[i]:
            found = [*found, [i]] if new else [*found[:-1], [*found[-1], i]]
        new = not example.supervised[i] or example.ids[i] == end
    return found


def squeezed(text):
    """Without white space, which templates put around reasoning tags as they like."""
    return "".join(text.split())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("last_turn_only", [False, True], ids=["all turns", "last turn"])
def test_trained_as_served_or_dropped(style, last_turn_only):
    tokenizer = STYLES[style].tokenizer()
    developer = "developer" if style == "harmony" else "system"
    trained = 0
    for name, messages in CONVERSATIONS.items():
        result = encode_row(Row("r:1", messages=tuple(messages)), tokenizer, 10_000, last_turn_only=last_turn_only)
        if isinstance(result, Dropped):
            assert ": " in result.reason and result.kind, name
            continue
        trained += 1
        renamed = [{**m, "role": developer if m["role"] == "developer" else m["role"]} for m in messages]
        end = tokenizer.convert_tokens_to_ids(STYLES[style].eos)
        answers = [(s, places) for s in result.segments for places in spans(s, end)]
        asked = [i for i, m in enumerate(messages) if m["role"] == "assistant"][-1 if last_turn_only else 0 :]
        assert len(answers) == len(asked), name
        for (segment, places), index in zip(answers, asked, strict=True):
            prompt = tokenizer.decode(segment.ids[: places[0]].tolist())
            assert prompt == as_served(renamed[:index], tokenizer, style), name
            assert has_all(messages[:index], prompt), name
            answer = tokenizer.decode(segment.ids[places].tolist())
            opened = "<think>" if prompt.endswith("<think>\n") else ""  # the prompt has begun the answer
            assert squeezed(messages[index]["content"]) in squeezed(opened + answer), name
            if "think" not in messages[index]["content"]:
                assert messages[index]["content"].strip() in answer, name
            ended = segment.ids[places[-1]] == end
            assert ended or (style in ENDLESS and index != asked[-1]), name
    assert trained == TRAINED[style][last_turn_only]


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_and_serving_ask_as_training_did(style):
    tokenizer = STYLES[style].tokenizer()
    for name, messages in CONVERSATIONS.items():
        row = Row("r:1", messages=tuple(messages))
        example = encode_row(row, tokenizer, 10_000, last_turn_only=True)
        if isinstance(example, Example):
            prompt = example.ids[: int(example.supervised.argmax())].tolist()
            assert prompt_and_reference(row, tokenizer) == (prompt, messages[-1]["content"]), name
            assert encode_prompt(messages[:-1], tokenizer) == prompt, name


def test_what_a_template_leaves_out_is_said_in_serving_too():
    tokenizer = STYLES["three-roles"].tokenizer()
    with pytest.raises(DataError, match=r"does not render it: messages\[1\] \(tool\)"):
        encode_prompt(CONVERSATIONS["tool"][:-1], tokenizer)
    with pytest.raises(DataError, match=r"does not render it: messages\[0\] \(system\)"):
        encode_prompt(CONVERSATIONS["system"][:-1], STYLES["no-system"].tokenizer())


REASONS = [
    ("three-roles", "tool", "the chat template does not render it: messages[1] (tool)"),
    ("three-roles", "a tool that says little", "the chat template does not render it: messages[1] (tool)"),
    ("three-roles", "unknown role", "the chat template does not render it: messages[1] (critic)"),
    ("no-system", "system", "the chat template does not render it: messages[0] (system)"),
    ("no-system", "developer", "the chat template does not render it: messages[0] (developer)"),
    ("gemma", "system", "the chat template refuses it: System role not supported"),
    (
        "headless",
        "reasoning beside",
        "reasoning: the chat template renders none beside the content (messages[1]); this base has no reasoning",
    ),
]


@pytest.mark.parametrize(("style", "conversation", "reason"), REASONS)
def test_reasons(style, conversation, reason):
    result = encode_row(Row("r:1", messages=tuple(CONVERSATIONS[conversation])), STYLES[style].tokenizer(), 10_000)
    assert isinstance(result, Dropped) and result.reason == reason


def test_many_rows_share_what_was_found_out():
    """Nothing is remembered of one row that decides another's fate."""
    tokenizer = STYLES["three-roles"].tokenizer()
    rows = [Row(name, messages=tuple(messages)) for name, messages in CONVERSATIONS.items()]
    for one, other in zip(encode_rows(rows, tokenizer, 10_000), encode_rows(rows[::-1], tokenizer, 10_000)[::-1], strict=True):
        assert type(one) is type(other) and one.origin == other.origin
        assert not isinstance(one, Example) or one.ids.tolist() == other.ids.tolist()


def test_an_answer_behind_a_prompt_that_says_more_has_the_blanks_of_the_finished_text():
    """mistral-later writes the system's text in the prompt alone; the blank before its answers is learnt all the same."""
    tokenizer = STYLES["mistral-later"].tokenizer()
    for name in ("plain", "system"):
        example = encode_row(Row("r:1", messages=tuple(CONVERSATIONS[name])), tokenizer, 10_000)
        answer = CONVERSATIONS[name][-1]["content"]
        assert tokenizer.decode(example.ids[example.supervised].tolist()) == f" {answer}</s>"
