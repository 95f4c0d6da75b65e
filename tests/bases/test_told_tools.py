"""Tools told in messages, on a template that knows none, read as Qwen 2.5's own template writes them."""

import pytest

from tests.bases.test_tool_turns import ARGUMENTS, WEATHER, call, named, talk
from trimtab.bases.calls import call_format
from trimtab.bases.template import BadRow, Template
from trimtab.bases.told_tools import CALLS, ToldTools, told

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def templates():
    """(Qwen 2.5's, one that knows no tools) over the same tokenizer."""
    plain = named("qwen2_5")
    plain.chat_template = CHATML
    return Template(named("qwen2_5")), Template(plain)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("content", [None, "I will look."])
def test_it_reads_as_qwens_template_writes_it(templates, system, content):
    theirs, plain = templates
    messages = [*(system or [{"role": "system", "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}])]
    messages += talk(ARGUMENTS, content or "")
    messages += [{"role": "tool", "tool_call_id": "call_1", "content": "and <warm>"}, {"role": "user", "content": "Thanks."}]
    given, variables = ToldTools(plain)(messages, {"tools": [WEATHER, WEATHER]})
    assert variables == {} and not plain.knows_tools
    assert plain.prompt(given) == theirs.prompt(messages, {"tools": [WEATHER, WEATHER]})
    assert call_format(theirs) == CALLS


def test_without_a_system_turn_the_first_question_has_them(templates):
    _, plain = templates
    messages = told([{"role": "user", "content": "hi"}], [WEATHER], system=False)
    assert [m["role"] for m in messages] == ["user"] and messages[0]["content"].endswith("</tool_call>\n\nhi")
    assert "get_weather" in messages[0]["content"]
    plain.prompt(messages)


def test_conversations_without_tools_stay_as_they_are(templates):
    messages = [{"role": "user", "content": "hi", "name": "Bo"}, {"role": "assistant", "content": "ho"}]
    assert ToldTools(templates[1])(messages, {"x": 1}) == (messages, {"x": 1})


def test_arguments_that_are_no_object_are_refused(templates):
    turn = {"role": "assistant", "content": "", "tool_calls": [call("[1]")]}
    with pytest.raises(BadRow, match="not an object"):
        ToldTools(templates[1])([{"role": "user", "content": "hi"}, turn], {})
